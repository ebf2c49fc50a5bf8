"""log M: the log of the pseudo-attention mass that a StableMask row carries beside its real scores.

Row p of eq. 8 holds the pseudo scores -j * gamma for p < j < N. They carry no value, so only their total
counts:

    M(p) = sum_{j=p+1}^{N-1} e^{-j gamma},  n = N-1-p terms
    log M(p) = -(p+1) gamma + log n + g(n gamma) - g(gamma),   g(x) = log((1 - e^-x) / x)

g is smooth through 0 (g(x) = -x/2 + x^2/24 - ...). So this form has neither 0/0 nor cancellation at a small
gamma, in its value or in its gradient. From the training length on (p >= N) the paper keeps one pseudo score,
tau = -(p+1) gamma (section 4.3), which is n = 1.

Shapes in names: B batch, H query heads (or 1), S queries.
"""

import math

import torch
from torch import Tensor

from sm_flex.checks.mask import check_gamma, check_length, check_position_values, check_positions

# The coefficients of x^2, x^4, ... in log(sinh(x/2) / (x/2)). Below |x| = SMALL they are exact to 1e-14.
SERIES = (1 / 24, -1 / 2880, 1 / 181440, -1 / 9676800, 1 / 479001600)
SMALL = 0.5
# From here on e^-gamma is 0 in every float dtype: the row is plain causal, as for gamma = inf.
HUGE = 1e30


def log_mass(gamma: float | Tensor, positions: Tensor, length: int) -> Tensor:
    """log M(p) = log sum_{j=p+1}^{N-1} e^{-j gamma}, in closed form (eq. 8 and section 4.3).

    From the training length on (p >= N) one pseudo score remains, log M = -(p+1) gamma. The row p = N-1 has
    none.
    Differentiable in gamma: d log M / d gamma at gamma = 0 is -(p+N)/2, and 0 where log M is -inf.

    Args:
        gamma: a number >= 0 (inf allowed), or a floating tensor, 0-d or (H,).
        positions: integer tensor (S,) or (B, S), the position p >= 0 of each query in its own sequence.
        length: N >= 1, the training length.

    Returns:
        (1, S) for a scalar gamma, (H, S) for one gamma per head; for (B, S) positions (B, 1, S) or (B, H, S).
        float32, or float64 for a float64 gamma tensor. -inf at p = N-1 and for gamma = inf. Natural log.

    Raises:
        TypeError, ValueError: gamma, positions or length of the wrong kind, shape or value.

    Example:
        >>> log_mass(0.0, torch.tensor([0, 1, 2, 3]), length=4).exp()
        tensor([[3., 2., 1., 0.]])
    """
    dtype = torch.float64 if isinstance(gamma, Tensor) and gamma.dtype == torch.float64 else torch.float32
    gamma = check_gamma(gamma)
    check_positions(positions)
    check_position_values(positions)
    check_length(length)
    if gamma.device != positions.device and gamma.dim() == 0:
        gamma = gamma.to(device=positions.device, dtype=dtype)
    if gamma.device != positions.device:
        raise ValueError(f"gamma and positions must be on one device, got {gamma.device} and {positions.device}")
    return log_mass_table(gamma, positions, None, None, length, positions.shape[-1], dtype)


def log_mass_table(
    gamma: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    sink: Tensor | None,
    length: int,
    num_queries: int,
    dtype: torch.dtype,
) -> Tensor:
    """log(M + e^sink) of every row: (1|H, S), or (B, 1|H, S) where positions or a sink have a batch dimension.

    gamma is 0-d or (H,). positions is (S,) or (B, S); None means 0..S-1, restarting at every document of
    cu_seqlens. sink is 0-d, (H,), or broadcastable to (B, H, S). All are on one device.
    """
    if positions is None:
        positions = row_positions(num_queries, cu_seqlens, gamma.device)
    # Computed in float64, where there is one: the table is small, so it costs nothing.
    precise = dtype if positions.device.type == "mps" else torch.float64
    log_m = closed_form(gamma.to(precise).reshape(-1, 1), _heads_beside_rows(positions), length)
    if sink is not None:
        log_m = log_add(log_m, sink_by_rows(sink, precise))
    return log_m.to(dtype)


def sink_by_rows(sink: Tensor, dtype: torch.dtype) -> Tensor:
    """A sink as a table of log M is, (1|H, 1|S) or (1|B, 1|H, 1|S)."""
    return (sink.reshape(-1, 1) if sink.dim() < 2 else sink).to(dtype)


def largest_pseudo_score(gamma: Tensor, positions: Tensor, length: int) -> Tensor:
    """The largest pseudo score of each row, in gamma's dtype and the shape of :func:`log_mass`.

    It is the first one, -(p+1) gamma, or for a learned gamma below 0 the last one, -(N-1) gamma. The row p =
    N-1 has none: -inf.
    """
    gamma, positions = gamma.reshape(-1, 1), _heads_beside_rows(positions)
    last = torch.where(positions < length, length - 1, positions + 1)
    largest = torch.maximum(-(positions + 1) * gamma, -last * gamma)
    return largest.masked_fill(positions == length - 1, -torch.inf)


def row_positions(num_rows: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """0..S-1, restarting at every document of cu_seqlens."""
    rows = torch.arange(num_rows, device=device)
    return rows if cu_seqlens is None else rows - cu_seqlens[document_of(rows, cu_seqlens)]


def document_of(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Which document each packed row belongs to: the last that starts at or before it."""
    last = cu_seqlens.shape[0] - 2
    return (torch.searchsorted(cu_seqlens, rows.to(cu_seqlens.dtype), right=True) - 1).clamp(max=last)


def closed_form(gamma_H1: Tensor, positions: Tensor, length: int) -> Tensor:
    """log M in gamma's dtype, for positions broadcastable to gamma. Every branch of a where() is finite."""
    positions = positions.long()
    terms = length - 1 - positions  # below 0 from N on, where the one pseudo score -(p+1) gamma remains
    empty = (terms == 0) | (gamma_H1 >= HUGE)
    n = terms.clamp(min=1).to(gamma_H1.dtype)
    gamma = torch.where(gamma_H1 >= HUGE, 1.0, gamma_H1)
    log_m = -(positions + 1) * gamma + n.log() + _log_ratio(n * gamma) - _log_ratio(gamma)
    return torch.where(empty, -math.inf, log_m)


def _heads_beside_rows(positions: Tensor) -> Tensor:
    """(S,) as it is, (B, S) as (B, 1, S): broadcastable with gamma (H, 1)."""
    return positions.unsqueeze(1) if positions.dim() == 2 else positions


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b), whose gradient is 0, not NaN, where both are -inf."""
    both_neg_inf = torch.isneginf(a) & torch.isneginf(b)
    total = torch.logaddexp(a.masked_fill(both_neg_inf, 0.0), b.masked_fill(both_neg_inf, 0.0))
    return total.masked_fill(both_neg_inf, -math.inf)


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
