"""The memory of a training pass by every entry point of a CPU, against scaled_dot_product_attention's.

    python -m benchmarks.memory

One head, forward and backward, inputs included: the most bytes held at once, as PyTorch's allocator reports
them. None may hold anything of S x S. The chunks' own way to call adds to theirs: queries are a slice, whose
gradient is a whole q, and their output is padded to the length of the others. A reference, the same around
SDPA without causality, says how much. The numbers do not depend on the machine.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import sm_flex
from benchmarks import report
from benchmarks.speed.timing import Call, training_peak
from sm_flex import headwise_gamma, stablemask
from sm_flex.visibility.blocks import narrow_block_mask

# The most that each may hold, of what SDPA does.
TARGET, CHUNK_TARGET = 1.12, 1.15
CHUNKS = ("second half against all", "second half, boolean mask")
# Those that work in blocks, whose size follows the length.
IN_PARTS = ("ALiBi score_mod", "block_mask", *CHUNKS)
REFERENCE = "second half, SDPA without causality"
DIM = 64


def entry_points(length: int) -> dict[str, Call]:
    """Every one that a CPU has, for one head."""
    mask = stablemask(headwise_gamma(1), length=length)
    keep = torch.ones(1, 1, 1, length, dtype=torch.bool)
    keep[..., -length // 8 :] = False
    cu = torch.tensor([0, length // 4, length], dtype=torch.int32)
    block_mask = narrow_block_mask(None, length, length, torch.device("cpu"))
    bias = torch.zeros(keep.shape).masked_fill(~keep, -math.inf)
    inner = stablemask(headwise_gamma(1), length=length, score_mod=lambda s, b, h, i, j: s - (i - j) / 256)
    return {
        "SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "plain": lambda q, k, v: sm_flex.flex_attention(q, k, v, score_mod=mask),
        "boolean padding mask": lambda q, k, v: sm_flex.scaled_dot_product_attention(q, k, v, keep, score_mod=mask),
        "float padding mask": lambda q, k, v: sm_flex.scaled_dot_product_attention(q, k, v, bias, score_mod=mask),
        "documents": lambda q, k, v: _packed(q, k, v, cu, length, (-1, 0), mask),
        "window 1024": lambda q, k, v: _packed(q, k, v, cu, length, (1024, 0), mask),
        "ALiBi score_mod": lambda q, k, v: sm_flex.flex_attention(q, k, v, score_mod=inner),
        "block_mask": lambda q, k, v: sm_flex.flex_attention(q, k, v, score_mod=mask, block_mask=block_mask),
        REFERENCE: lambda q, k, v: _padded(F.scaled_dot_product_attention(q[:, :, length // 2 :], k, v), length),
        "second half against all": lambda q, k, v: _half(q, k, v, None),
        "second half, boolean mask": lambda q, k, v: _half(q, k, v, keep),
    }


def target(name: str) -> float:
    return CHUNK_TARGET if name in CHUNKS else TARGET


def measure(length: int) -> dict[str, dict[str, float]]:
    """Peak bytes of a training pass, inputs included, and its ratio to SDPA's."""
    found: dict[str, dict[str, float]] = {}
    for name, call in tqdm(entry_points(length).items(), unit="call", dynamic_ncols=True):
        q, k, v = [torch.randn(1, 1, length, DIM, requires_grad=True) for _ in range(3)]
        peak = training_peak(call, (q, k, v, torch.randn(1, 1, length, DIM)), torch.device("cpu"))
        found[name] = {"bytes": peak, "ratio": peak / (found["SDPA"]["bytes"] if found else peak)}
    return found


def _packed(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, length: int, window: tuple[int, int], mask: sm_flex.StableMask
) -> Tensor:
    q, k, v = [x[0].transpose(0, 1) for x in (q, k, v)]
    out = sm_flex.varlen_attn(q, k, v, cu, cu, length, length, window_size=window, score_mod=mask)
    return out.transpose(0, 1).unsqueeze(0)  # pyright: ignore[reportAttributeAccessIssue]


def _half(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
    half, length = k.shape[2] // 2, k.shape[2]
    mask = stablemask(headwise_gamma(1), length=length, positions=torch.arange(half, length))
    if keep is None:
        out = sm_flex.flex_attention(q[:, :, half:], k, v, score_mod=mask)
    else:
        out = sm_flex.scaled_dot_product_attention(q[:, :, half:], k, v, keep, score_mod=mask)
    return _padded(out, length)  # pyright: ignore[reportArgumentType]


def _padded(out: Tensor, length: int) -> Tensor:
    """Zeros for the queries that are not attended, so that the shapes agree."""
    return F.pad(out, (0, 0, length - out.shape[2], 0))


def _judged(ratio: float, most: float) -> str:
    return "met" if ratio <= most else "missed"


def main(argv: list[str] | None = None) -> None:
    parser = report.Parser("memory", "Peak memory of every entry point, on a CPU.")
    parser.number("--length", 32768, "S", least=64)
    args = parser.parse(argv)
    with parser.refusing():
        result = report.Result(parser, args.out, "memory", torch.device("cpu"))
    found = measure(args.length)
    rows = []
    for name, x in found.items():
        judged = ("", "") if name in ("SDPA", REFERENCE) else (f"{target(name):.2f}", _judged(x["ratio"], target(name)))
        rows.append((name, f"{x['bytes'] / 2**20:.1f}", f"{x['ratio']:.3f}", *judged))
    table = report.markdown_table(("entry point", "peak MiB", "ratio to SDPA", "at most", "target"), rows)
    notes = f"Forward and backward, S = {args.length}, one head, head_dim 64, float32, inputs included. SDPA: is_causal. "
    notes += f"{REFERENCE}: the slice of q and the padding of the output that the rows below it have too."
    result.publish("Memory of a training pass", table, notes, {"entry points": found})


if __name__ == "__main__":
    main()
