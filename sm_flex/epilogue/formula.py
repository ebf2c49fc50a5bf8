"""The real share s of a row (alpha_i in section 4.2), its complement, and the log-sum-exp of the whole row."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def shares(lse: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor]:
    """The real share s of each row and lse'. A dead row, lse = -inf, has share 0, also where log M = -inf too."""
    dead = torch.isneginf(lse)
    share = torch.sigmoid(lse.masked_fill(dead, 0.0) - log_mass).masked_fill(dead, 0.0)
    return share, torch.logaddexp(lse, log_mass)


def shares_alive(lse: Tensor, log_mass: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """shares() where no row is dead, in less than half the time: logaddexp is slow in the layout of the CPU op's lse."""
    gap = lse - log_mass
    return torch.sigmoid(gap), torch.maximum(lse, log_mass) - logsigmoid(gap.abs()) if want_lse else None


def pseudo_share(new_lse: Tensor, log_mass: Tensor) -> Tensor:
    """1 - s = exp(log M - lse'), accurate where s rounds to 1."""
    return exp_difference(log_mass, new_lse)


def exp_difference(a: Tensor, b: Tensor) -> Tensor:
    """exp(a - b), 0 where a is -inf (a dead row has b = -inf too)."""
    gone = torch.isneginf(a)
    return torch.exp(a.masked_fill(gone, 0.0) - b).masked_fill(gone | torch.isneginf(b), 0.0)
