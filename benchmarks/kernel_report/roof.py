"""Budgets of the kernel's instructions, and what the counts mean on a GPU: bytes against instructions, on paper.

A streaming multiprocessor issues four instructions per clock at most; a kernel is taken to reach ISSUED of
that, and whichever of bytes and instructions takes longer to be its time, since they overlap.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_report.cubin import Cubin, Variant
from benchmarks.speed.targets import GPU, Target
from sm_flex.epilogue.kernel import HALF_ULP, NUM_WARPS
from sm_flex.mass.closed_form import log_mass_table
from sm_flex.mass.gamma import headwise_gamma

# (bytes per element, head_dim): at most so many warp-instructions for 32 rows, touched and skipped.
BUDGETS = {
    (2, 64): (800, 300), (2, 128): (1400, 400), (2, 256): (2600, 800),
    (4, 64): (900, 400), (4, 128): (1800, 800), (4, 256): (3200, 1600),
}  # fmt: skip
# The same where a sink carries a value: one multiplication more per element, and two numbers per row instead of the
# arithmetic of log M, which then comes from a table.
VALUE_BUDGETS = {
    (2, 64): (750, 200), (2, 128): (1400, 250), (2, 256): (2600, 500),
    (4, 64): (900, 250), (4, 128): (1600, 500), (4, 256): (2600, 1000),
}  # fmt: skip


class Machine(NamedTuple):
    """copy is what copying memory reaches, assumed to be 0.87 of the data sheet's bandwidth; bytes per second."""

    name: str
    multiprocessors: int
    clock: float
    copy: float
    registers: int = 65536
    issue_slots: int = 4


MACHINES = {
    80: Machine("A100 80 GB", 108, 1.41e9, 1.75e12),
    90: Machine("H100 SXM", 132, 1.755e9, 2.9e12),
    100: Machine("B200", 148, 1.85e9, 6.9e12),
}
ISSUED = 0.6
# Of fused attention in bf16 on an H100, forward and backward.
FLOPS = 400e12
TOKENS, HEADS, HEAD_DIM = 32768, 16, 128
LENGTHS = (2048, 4096, 8192, 16384)
# Of a sink with a value: time over plain attention's at these lengths, and the share of the copy bandwidth.
VALUE_LIMITS = (1.06, 1.03, 1.015, 1.01)
VALUE_COPY = 0.85


def per_32_rows(variant: Variant, cubin: Cubin) -> tuple[int, int]:
    """Warp-instructions for 32 rows that are touched, and for 32 that are skipped."""
    touched, skipped = [round(n * NUM_WARPS * 32 / variant.rows) for n in (cubin.instructions, cubin.skipped)]
    return touched, skipped


def budget(variant: Variant) -> tuple[int, int]:
    return (VALUE_BUDGETS if variant.has_value else BUDGETS)[variant.dtype.itemsize, variant.head_dim]


def over_budget(variant: Variant, cubin: Cubin) -> bool:
    """Out of place no tile is skipped."""
    touched, skipped = per_32_rows(variant, cubin)
    most, most_skipped = budget(variant)
    return touched > most or (variant.in_place and skipped > most_skipped)


def warps_in_flight(arch: int, cubin: Cubin) -> int:
    """Per multiprocessor, as registers allow; it holds 32 blocks at most. Registers are given out eight at a time."""
    return min(32 * NUM_WARPS, MACHINES[arch].registers // (-(-cubin.registers // 8) * 8 * 32))


def issue_bound(variant: Variant, cubin: Cubin) -> float:
    """Bytes per second at which a touched tile's instructions fill every issue slot."""
    machine = MACHINES[variant.arch]
    clocks = cubin.instructions * NUM_WARPS / machine.issue_slots
    return tile_bytes(variant) * machine.multiprocessors * machine.clock / clocks


def tile_bytes(variant: Variant) -> int:
    """Of a touched tile: out read and written, lse read, lse' written."""
    return variant.rows * (2 * variant.head_dim * variant.dtype.itemsize + 8)


class Estimate(NamedTuple):
    """One pass of the epilogue over TOKENS tokens on paper. Times are in microseconds."""

    length: int
    gamma: str
    touched: float
    megabytes: float
    bytes_us: float
    issue_us: float
    attention_us: float

    @property
    def us(self) -> float:
        return max(self.bytes_us, self.issue_us)


def estimate(length: int, gamma: str, variant: Variant, cubin: Cubin) -> Estimate:
    """gamma is "zero", "headwise", or "value": a sink with a value, of which every row has a share."""
    machine = MACHINES[variant.arch]
    gammas = torch.zeros(HEADS) if gamma == "zero" else headwise_gamma(HEADS)
    touched = 1.0 if gamma == "value" else share_of_tiles_touched(length, gammas, variant)
    rows = TOKENS * HEADS
    table = 4 if variant.source == "table" else 0
    size = rows * (8 + table) + touched * rows * 2 * variant.head_dim * variant.dtype.itemsize
    tiles = rows / variant.rows * NUM_WARPS
    instructions = tiles * (touched * cubin.instructions + (1 - touched) * cubin.skipped)
    slots = machine.multiprocessors * machine.issue_slots * machine.clock * ISSUED
    attention = 3.5 * 4 * variant.head_dim * HEADS * TOKENS * length / 2 / FLOPS
    return Estimate(length, gamma, touched, size / 1e6, size / machine.copy * 1e6, instructions / slots * 1e6, attention * 1e6)


def share_of_tiles_touched(length: int, gamma: Tensor, variant: Variant) -> float:
    """Where scores are standard normal: a row of n keys has lse = log n + 1/2."""
    lse = torch.arange(1, length + 1, dtype=torch.float64).log() + 0.5
    log_mass = log_mass_table(gamma, None, None, None, length, length, torch.float64)
    changed = torch.sigmoid(log_mass - lse) >= HALF_ULP[variant.dtype]
    tiles = F.pad(changed, (0, -length % variant.rows)).unflatten(-1, (-1, variant.rows)).any(-1)
    return tiles.double().mean().item()


def judge(estimates: list[Estimate]) -> list[tuple[str, float, float, bool]]:
    """(target, its limit, the worst figure on paper, whether that meets it), of those that these figures speak of."""
    of = {(at.length, at.gamma): at for at in estimates}
    copy = min(at.bytes_us / at.us for at in estimates if at.gamma == "zero")
    figures = {
        "epilogue, gamma 0: of the measured copy bandwidth": copy,
        "epilogue, head-wise at 4k: of gamma 0's time": of[4096, "headwise"].us / of[4096, "zero"].us,
    }
    for target in GPU:
        same_engine = target.text.startswith("StableMask / plain on the same engine")
        lengths, gammas = target.where.get("length", ()), target.where.get("gamma", ())
        if same_engine:
            figures[target.text] = max(
                1 + at.us / at.attention_us for at in estimates if at.length in lengths and at.gamma in gammas
            )
    return [(t.text, t.limit, figures[t.text], _meets(t, figures[t.text])) for t in GPU if t.text in figures]


def judge_value(estimates: list[Estimate]) -> list[tuple[str, float, float, bool]]:
    """The same of a sink with a value, within the limits of gamma 0, which touches every tile too."""
    figures = {f"a sink with a value / plain, forward+backward, S = {at.length}": 1 + at.us / at.attention_us for at in estimates}
    limits = dict(zip(figures, VALUE_LIMITS, strict=True))
    judged = [(text, limits[text], figure, figure <= limits[text]) for text, figure in figures.items()]
    copy = min(at.bytes_us / at.us for at in estimates)
    return [*judged, ("epilogue, a sink with a value: of the measured copy bandwidth", VALUE_COPY, copy, copy >= VALUE_COPY)]


def _meets(target: Target, figure: float) -> bool:
    return figure >= target.limit if target.at_least else figure <= target.limit
