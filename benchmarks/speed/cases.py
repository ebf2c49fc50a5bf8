"""What benchmarks.speed measures: the cases of a GPU and of a CPU, the most important first."""

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from benchmarks.report import num_cores
from sm_flex.runtime import BEFORE_2_14

WINDOW = 1024
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GPU_TOKENS, CPU_TOKENS = 32768, 8192
# The formula of the paper holds several (B, H, S, S) tensors: beyond this S they do not fit beside everything else.
DENSE_UP_TO = 4096

# What a person would pick today for attention with a sink or a mass: benchmarks/speed/peers.py has each.
COMPILED_PEER = "flex compiled"
PEERS = (
    "transformers",
    "softmax-n",
    "softmax-n slow",
    "x-transformers",
    "x-transformers flash",
    "flex lse",
    COMPILED_PEER,
    "dense",
)
# On a CPU compiling takes longer than all the rest of a case.
COMPILED_AT = (512, 2048, 8192)
GROWTH_TO = 65536

# Engines: a pair (plain attention, StableMask on it) each, but for the last four, which have a partner among these.
PAIRS = ("flash", "cudnn", "cpu", "cpu compiled", "varlen", "flex", "flex FLASH")
OURS_ALONE = ("auto", "auto compiled")
BASELINES = ("titan", "dense")
# What sm_flex.flex_attention calls the same engine: kernel_options={"BACKEND": ...}.
BACKEND_OF = {
    "flash": "FLASH_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "cpu": "FLASH_ATTENTION",
    "cpu compiled": "FLASH_ATTENTION",
    "flex": "TRITON",
    "flex FLASH": "FLASH",
}
# By the module that PyTorch takes each from.
FLASH_IMPLS = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}


class Case(NamedTuple):
    """One comparison: its variants take turns on the same inputs.

    group is attention, memory (one pass, nothing timed), epilogue, decode, first call, peers or growth. length is
    S, for packed documents their mean; there are batch * length tokens; growth begins at a 64th of it. impl
    replaces PyTorch's own flash kernel (FA3, FA4).
    """

    group: str
    engines: tuple[str, ...]
    length: int
    batch: int
    kind: str = "causal"
    head_dim: int = 128
    heads: int = 16
    kv_heads: int = 16
    dtype: str = "bf16"
    threads: int = 0
    impl: str = ""

    @property
    def name(self) -> str:
        heads = f"{self.heads}:{self.kv_heads} heads"
        parts = [self.kind if self.group == "attention" else self.group, f"S {self.length}", f"B {self.batch}", heads]
        parts += [f"D {self.head_dim}", self.dtype]
        parts += [f"{self.threads} thread{'s' * (self.threads > 1)}"] if self.threads else []
        return ", ".join(parts + [self.impl] * bool(self.impl))


def plan(device: torch.device) -> list[Case]:
    return gpu_plan() if device.type == "cuda" else cpu_plan()


def flex_engines() -> tuple[str, ...]:
    """torch's flex on Triton, and on FLASH where it is right: before torch 2.14 its lse is off by ln 2."""
    return ("flex", "flex FLASH") if not BEFORE_2_14 and _importable("flash_attn.cute") else ("flex",)


def gpu_plan() -> list[Case]:
    flex = flex_engines()

    def attention(length: int, engines: tuple[str, ...], **fields: Any) -> Case:
        return Case("attention", engines, length, GPU_TOKENS // length, **fields)

    def full(length: int) -> tuple[str, ...]:
        dense = ("dense",) if length <= DENSE_UP_TO else ()
        return ("flash", "cudnn", "varlen", *flex, "auto", "auto compiled", "titan", *dense)

    kernels = ("flash", "cudnn", "auto")
    gqa: dict[str, Any] = {"kv_heads": 4}
    half: dict[str, Any] = {"head_dim": 64, "heads": 32, "kv_heads": 32}
    cases = [
        attention(4096, full(4096)),
        Case("epilogue", (), 4096, GPU_TOKENS // 4096),
        Case("decode", (), 4096, 8, heads=32, kv_heads=8),
        *(attention(length, full(length)) for length in (2048, 8192, 16384)),
        attention(4096, (*kernels, "flex"), **gqa),
        attention(4096, ("varlen", "flex"), kind="packed"),
        attention(4096, ("flex", "varlen"), kind="window"),
        attention(4096, ("flex",), kind="alibi"),
        *(Case("peers", PEERS, length, GPU_TOKENS // length) for length in (4096, 2048, 512, 1024, 8192, 16384)),
        *(attention(length, ("flash", "auto"), impl=impl) for impl, module in FLASH_IMPLS.items() for length in _lengths(module)),
        *(attention(length, full(length)) for length in (32768, 1024)),
        attention(4096, (*kernels, "flex"), **half),
        *(attention(length, kernels, **half) for length in (2048, 8192)),
        Case("first call", (), 1024, 8),
        *(attention(length, kernels, **gqa) for length in (2048, 8192)),
        Case("decode", (), 4096, 1, heads=32, kv_heads=8),
        Case("epilogue", (), 16384, GPU_TOKENS // 16384),
        *(attention(length, kernels, **fields) for length in (1024, 16384, 32768) for fields in (half, gqa)),
        attention(1024, ("varlen", "flex"), kind="packed"),
        attention(16384, ("flex", "varlen"), kind="window"),
        attention(16384, ("flex",), kind="alibi"),
    ]
    return cases


def cpu_plan() -> list[Case]:
    def attention(length: int, engines: tuple[str, ...] = ("cpu",), **fields: Any) -> Case:
        every: dict[str, Any] = {"head_dim": 64, "heads": 2, "kv_heads": 2, "dtype": "fp32", "threads": num_cores()} | fields
        return Case("attention", engines, length, CPU_TOKENS // length, **every)

    def peers(length: int, dtype: str) -> Case:
        engines = PEERS if length in COMPILED_AT else tuple(name for name in PEERS if name != COMPILED_PEER)
        batch = max(1, CPU_TOKENS // length) if length < 4096 else 1
        return Case("peers", engines, length, batch, head_dim=64, heads=2, kv_heads=2, dtype=dtype, threads=num_cores())

    alone: dict[str, Any] = {"head_dim": 64, "heads": 1, "kv_heads": 1, "dtype": "fp32", "threads": num_cores()}
    two: dict[str, Any] = {**alone, "heads": 2, "kv_heads": 2}
    step: dict[str, Any] = {**alone, "heads": 16, "kv_heads": 16}
    counts = sorted({1, num_cores()}, reverse=True)
    grid = [(dtype, threads) for threads in counts for dtype in ("bf16", "fp32")]
    main = attention(1024, ("cpu", "cpu compiled"))
    steps = [attention(length, dtype=d, threads=n) for length in (2048, 1024, 256, 4096, 512) for d, n in grid]
    return [
        main,
        *(case for case in steps if case.name != main.name),
        Case("first call", (), 1024, 1, **alone),
        *(
            Case("decode", (), length, batch, **_with(step, head_dim=dim))
            for dim in (64, 128)
            for length in (512, 2048)
            for batch in (1, 8)
        ),
        *(peers(length, dtype) for length in (2048, 512, 4096) for dtype in ("fp32", "bf16")),
        Case("memory", ("cpu",), 32768, 1, **alone),
        *(peers(length, dtype) for length in (256, 1024, 8192) for dtype in ("fp32", "bf16")),
        *(
            Case("growth", ("cpu",), GROWTH_TO, 1, **_with(heads, dtype=dtype))
            for heads in (alone, two)
            for dtype in ("fp32", "bf16")
        ),
        *(attention(8192, dtype=d, threads=n) for d, n in grid),
        attention(2048, kind="window"),
        attention(1024, kind="alibi"),
        attention(1024, ("varlen",), kind="packed"),
        *(peers(16384, dtype) for dtype in ("fp32", "bf16")),
    ]


def _with(fields: dict[str, Any], **others: Any) -> dict[str, Any]:
    return fields | others


def _lengths(module: str) -> tuple[int, ...]:
    """One case says that it is not installed."""
    return (4096, 8192, 2048) if _importable(module) else (4096,)


def document_lengths(case: Case) -> list[int]:
    """Packed documents of half, one and one and a half times the mean, together batch * length tokens."""
    total, lengths, short = case.batch * case.length, [], max(1, case.length // 2)
    while total:
        lengths.append(min(total, (short, 3 * short, 2 * short)[len(lengths) % 3]))
        total -= lengths[-1]
    return lengths


def pairs(case: Case) -> float:
    """Visible (query, key) pairs of one head over the batch, half of S * S where causal."""
    if case.kind == "packed":
        return sum(n * n / 2 for n in document_lengths(case))
    if case.kind == "window" and case.length > WINDOW:
        return case.batch * (case.length * WINDOW - WINDOW * WINDOW / 2)
    return case.batch * case.length * case.length / 2


def expected_flops(case: Case) -> float:
    """What a case is known to take beforehand: the long ones, in plain forward and backward passes of its length."""
    passes = {"peers": 80.0, "growth": 4.0}.get(case.group, 0.0)
    return passes * flops(case, "forward+backward")


def flops(case: Case, mode: str) -> float:
    """Forward 4 D per visible pair and head (two products, multiply and add), backward 2.5 times that."""
    forward = 4 * case.head_dim * case.heads * pairs(case)
    return forward * {"forward": 1, "backward": 2.5, "forward+backward": 3.5}[mode]


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
