"""The Triton kernel against the plain formula, for the tests that launch it."""

import math
from types import ModuleType

import torch
from torch import Tensor

from sm_flex.epilogue import kernel as rk
from sm_flex.epilogue.formula import real_share_and_lse
from sm_flex.mass.table import Mass
from sm_flex.testing.tolerance import assert_within

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The error of a share computed in float32.
SHARE = 3e-6


def launch(out: Tensor, lse: Tensor, mass: Mass, in_place: bool, module: ModuleType = rk) -> tuple[Tensor, Tensor]:
    """The kernel (of another module: with a planted fault) on poisoned buffers; in place on a copy with out's strides."""
    new_lse = torch.full_like(lse, math.nan)
    new_out = torch.full_like(out, math.nan)
    if in_place:
        new_out = new_out.copy_(out)
    module._launch(module.remask_kernel, new_out if in_place else out, new_out, lse, new_lse, mass, in_place=in_place)
    return new_out, new_lse


def check(out: Tensor, lse: Tensor, mass: Mass, in_place: bool) -> None:
    share, expected_lse = real_share_and_lse(lse, mass.table(lse.shape[-1], torch.float32))
    new_out, new_lse = launch(out, lse, mass, in_place)
    torch.testing.assert_close(new_lse, expected_lse, rtol=SHARE, atol=SHARE, equal_nan=True)
    # Half an ulp for rounding to the dtype, beside the error of the share.
    half_ulp = torch.finfo(out.dtype).eps / 2
    smallest = torch.finfo(out.dtype).smallest_normal * half_ulp
    expected = out.double() * share.double().unsqueeze(-1)
    torch.testing.assert_close(new_out.double(), expected, rtol=half_ulp + SHARE, atol=smallest, equal_nan=True)


def check_value(out: Tensor, lse: Tensor, mass: Mass, in_place: bool, module: ModuleType = rk) -> None:
    new_out, new_lse = launch(out, lse, mass, in_place, module)
    assert_right_with_value(out, lse, mass, new_out, new_lse)


def assert_right_with_value(out: Tensor, lse: Tensor, mass: Mass, new_out: Tensor, new_lse: Tensor) -> None:
    """Against (e^lse out + e^sink v) / (e^lse + M) and log(e^lse + M) in float64, for scores that float64 can raise e to."""
    assert mass.log_mass_HS is not None
    assert mass.sink_HS is not None
    assert mass.sink_value_HD is not None
    real, whole, sink = [torch.exp(x.double()).expand(lse.shape).unsqueeze(-1) for x in (lse, mass.log_mass_HS, mass.sink_HS)]
    total = real + whole
    none = total == 0
    # Nothing is taken of a row without keys, which may hold NaN.
    terms = (out.double().masked_fill(real == 0, 0.0) * real, sink * mass.sink_value_HD.double().unsqueeze(-2))
    real_part, sink_part = [(x / total).masked_fill(none, 0.0) for x in terms]
    expected = real_part + sink_part
    # The two may cancel, but what each may be wrong by does not.
    half_ulp = torch.finfo(out.dtype).eps / 2
    smallest = torch.finfo(out.dtype).smallest_normal * half_ulp
    budget = half_ulp * expected.abs() + SHARE * (real_part.abs() + sink_part.abs()) + smallest
    assert_within(new_out, expected, budget, "out")
    expected_lse = total.squeeze(-1).log()
    assert_within(new_lse, expected_lse, SHARE * (1 + expected_lse.abs().masked_fill(none.squeeze(-1), 0.0)), "lse")


def problem(rows: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out in the (B, S, H, D) memory of flash attention and lse in the (B, S, H) memory of the CPU op; one fully masked row."""
    out = torch.randn(2, rows, 3, dim).to(dtype).transpose(1, 2)
    lse = (2 * torch.randn(2, rows, 3)).transpose(1, 2)
    lse[0, 1, rows // 2] = -math.inf
    return out.to(DEVICE), lse.to(DEVICE)


def with_sink(log_mass: Tensor, sink: Tensor, value: Tensor) -> Mass:
    """The Mass of a sink that carries a value beside a log M without it."""
    return Mass(torch.logaddexp(log_mass, sink).to(DEVICE), sink_HS=sink.to(DEVICE), sink_value_HD=value.to(DEVICE))
