"""The real share s of a row (alpha_i in section 4.2), its complement, and the log-sum-exp of the whole row."""

import torch
from torch import Tensor


def shares(lse: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor]:
    """The real share s of each row and lse'."""
    dead = torch.isneginf(lse)
    share = torch.sigmoid(lse.masked_fill(dead, 0.0) - log_mass).masked_fill(dead, 0.0)
    return share, torch.logaddexp(lse, log_mass)


def pseudo_share(new_lse: Tensor, log_mass: Tensor) -> Tensor:
    """1 - s = exp(log M - lse'), accurate where s rounds to 1."""
    return exp_difference(log_mass, new_lse)


def exp_difference(a: Tensor, b: Tensor) -> Tensor:
    """exp(a - b), 0 where a is -inf (a dead row has b = -inf too)."""
    gone = torch.isneginf(a)
    return torch.exp(a.masked_fill(gone, 0.0) - b).masked_fill(gone | torch.isneginf(b), 0.0)
