"""log M: the log of the pseudo-attention mass that a StableMask row carries beside its real scores.

Row p of eq. 8 holds the pseudo scores -j * gamma for p < j < N. They carry no value, so only their total counts:

    M(p) = sum_{j=p+1}^{N-1} e^{-j gamma},  n = N-1-p terms
    log M(p) = -(p+1) gamma + log n + g(n gamma) - g(gamma),   g(x) = log((1 - e^-x) / x)

g is smooth through 0 (g(x) = -x/2 + x^2/24 - ...), so this form has neither 0/0 nor cancellation at small gamma, in its
value or in its gradient. Beyond the training length (p >= N) the paper keeps one pseudo score, tau = -(p+1) gamma
(section 4.3), which is n = 1.
"""

import math

import torch
from torch import Tensor

# x^2, x^4, ... coefficients of log(sinh(x/2) / (x/2)); below |x| = SMALL they are exact to 1e-14.
SERIES = (1 / 24, -1 / 2880, 1 / 181440, -1 / 9676800, 1 / 479001600)
SMALL = 0.5
# From here on e^-gamma is nothing in any float: the row is plain causal, as for gamma = inf.
HUGE = 1e30


def document_of(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Which document each packed row belongs to: the last that starts at or before it."""
    last = cu_seqlens.shape[0] - 2
    return (torch.searchsorted(cu_seqlens, rows.to(cu_seqlens.dtype), right=True) - 1).clamp(max=last)


def closed_form(gamma: Tensor, positions: Tensor, length: int) -> Tensor:
    """log M for gamma (H|1, 1) and positions broadcastable to it, in gamma's dtype; every branch of a where() is finite."""
    positions = positions.long()
    terms = length - 1 - positions  # below 0 from N on, where the one pseudo score -(p+1) gamma remains
    empty = (terms == 0) | (gamma >= HUGE)
    n = terms.clamp(min=1).to(gamma.dtype)
    gamma = torch.where(gamma >= HUGE, 1.0, gamma)
    log_m = -(positions + 1) * gamma + n.log() + _log_ratio(n * gamma) - _log_ratio(gamma)
    return torch.where(empty, -math.inf, log_m)


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b), whose gradient is 0, not NaN, where both are -inf."""
    gone = torch.isneginf(a) & torch.isneginf(b)
    return torch.logaddexp(a.masked_fill(gone, 0.0), b.masked_fill(gone, 0.0)).masked_fill(gone, -math.inf)


def _log_ratio(x: Tensor) -> Tensor:
    """g(x) = log((1 - e^-x) / x), differentiable everywhere; for x < 0 by g(x) = g(-x) - x."""
    small = x.abs() < SMALL
    y = torch.where(small, x, 0.0)
    y2 = y * y
    even = torch.zeros_like(y2)
    for coefficient in reversed(SERIES):
        even = (even + coefficient) * y2
    z = torch.where(small, 1.0, x.abs())
    return torch.where(small, even - y / 2, torch.log1p(-torch.exp(-z)) - z.log() + torch.relu(-x))
