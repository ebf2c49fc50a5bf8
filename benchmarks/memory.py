"""The memory of a training pass, for every way in that a CPU has, against scaled_dot_product_attention's.

    python -m benchmarks.memory

One head, forward and backward, the most bytes held at once as PyTorch's allocator reports them, inputs included: no path may hold
anything of S x S. The numbers do not depend on the machine.
"""

import math
import shlex
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import sm_flex
from benchmarks import report
from benchmarks.speed.timing import Call, training_peak
from sm_flex import headwise_gamma, stablemask
from sm_flex.visibility.blocks import narrow_block_mask

TARGET = 1.2
DIM = 64


def ways(length: int) -> dict[str, Call]:
    """Every way in that a CPU has, for one head."""
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
        "second half against all": lambda q, k, v: _half(q, k, v, None),
        "second half, boolean mask": lambda q, k, v: _half(q, k, v, keep),
    }


def memory_of_every_way(length: int) -> dict[str, dict[str, float]]:
    """Peak bytes of a training pass, inputs included, and its ratio to SDPA's."""
    found: dict[str, dict[str, float]] = {}
    for name, call in tqdm(ways(length).items(), unit="way", dynamic_ncols=True):
        q, k, v = [torch.randn(1, 1, length, DIM, requires_grad=True) for _ in range(3)]
        peak = training_peak(call, (q, k, v, torch.randn(1, 1, length, DIM)), torch.device("cpu"))
        found[name] = {"bytes": peak}
        found[name]["ratio"] = found[name]["bytes"] / found["SDPA"]["bytes"]
    return found


def _packed(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, length: int, window: tuple[int, int], mask: sm_flex.StableMask
) -> Tensor:
    q, k, v = [x[0].transpose(0, 1) for x in (q, k, v)]
    out = sm_flex.varlen_attn(q, k, v, cu, cu, length, length, window_size=window, score_mod=mask)
    return out.transpose(0, 1).unsqueeze(0)  # pyright: ignore[reportAttributeAccessIssue]


def _half(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
    """The first half of the output is no StableMask's: zeros, so that the shapes agree."""
    half, length = k.shape[2] // 2, k.shape[2]
    mask = stablemask(headwise_gamma(1), length=length, positions=torch.arange(half, length))
    if keep is None:
        out = sm_flex.flex_attention(q[:, :, half:], k, v, score_mod=mask)
    else:
        out = sm_flex.scaled_dot_product_attention(q[:, :, half:], k, v, keep, score_mod=mask)
    return F.pad(out, (0, 0, half, 0))  # pyright: ignore[reportArgumentType]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.Parser(prog="python -m benchmarks.memory", description="Peak memory of every way in, on a CPU.")
    parser.add_argument("--length", type=int, default=32768, help="S (default %(default)s)")
    parser.add_argument("--out", type=Path, default=report.OUT, help="folder for the results (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        report.at_least("--length", args.length, 64)
        stem = report.result_stem(report.out_folder(args.out), "memory", torch.device("cpu"))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    source = report.environment(shlex.join(["python", "-m", "benchmarks.memory", *argv]), torch.device("cpu"))
    found = memory_of_every_way(args.length)
    rows = [
        (name, f"{x['bytes'] / 2**20:.1f}", f"{x['ratio']:.3f}", "met" if x["ratio"] <= TARGET else "missed")
        for name, x in found.items()
    ]
    table = report.markdown_table(("way in", "peak MiB", "ratio to SDPA", f"at most {TARGET}"), rows)
    notes = f"Forward and backward, S = {args.length}, one head, head_dim 64, float32, inputs included. SDPA: is_causal."
    report.write(stem, "Memory of a training pass", source, table, notes, {"benchmark": "memory", "ways": found})
    print(table)
    print(f"wrote {stem}.md and .json")


if __name__ == "__main__":
    main()
