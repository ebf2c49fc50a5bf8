"""The Triton kernel against the plain formula, for the tests that launch it."""

import math

import torch
from torch import Tensor

from sm_flex.epilogue import kernel as rk
from sm_flex.epilogue.formula import real_share_and_lse
from sm_flex.mass.table import Mass

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def launch(out: Tensor, lse: Tensor, mass: Mass, in_place: bool) -> tuple[Tensor, Tensor]:
    """The kernel on poisoned buffers; in place it works on a copy of out with out's strides."""
    new_lse = torch.full_like(lse, math.nan)
    new_out = torch.full_like(out, math.nan)
    if in_place:
        new_out = new_out.copy_(out)
    rk._launch(rk.remask_kernel, new_out if in_place else out, new_out, lse, new_lse, mass, in_place=in_place)
    return new_out, new_lse


def check(out: Tensor, lse: Tensor, mass: Mass, in_place: bool) -> None:
    share, expected_lse = real_share_and_lse(lse, mass.table(lse.shape[-1], torch.float32))
    new_out, new_lse = launch(out, lse, mass, in_place)
    torch.testing.assert_close(new_lse, expected_lse, rtol=3e-6, atol=3e-6, equal_nan=True)
    # Half an ulp for rounding to the dtype, beside the error of the share.
    half_ulp = torch.finfo(out.dtype).eps / 2
    smallest = torch.finfo(out.dtype).smallest_normal * half_ulp
    expected = out.double() * share.double().unsqueeze(-1)
    torch.testing.assert_close(new_out.double(), expected, rtol=half_ulp + 3e-6, atol=smallest, equal_nan=True)


def problem(rows: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out in the (B, S, H, D) memory of flash attention and lse in the (B, S, H) memory of the CPU op; one fully masked row."""
    out = torch.randn(2, rows, 3, dim).to(dtype).transpose(1, 2)
    lse = (2 * torch.randn(2, rows, 3)).transpose(1, 2)
    lse[0, 1, rows // 2] = -math.inf
    return out.to(DEVICE), lse.to(DEVICE)
