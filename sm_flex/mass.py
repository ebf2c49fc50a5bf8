"""log M: the log of the pseudo-attention mass that a StableMask row carries beside its real scores.

Row p of eq. 8 holds the pseudo scores -j * gamma for p < j < N. They carry no value, so only their total counts:

    M(p) = sum_{j=p+1}^{N-1} e^{-j gamma},  n = N-1-p terms
    log M(p) = -(p+1) gamma + log n + g(n gamma) - g(gamma),   g(x) = log((1 - e^-x) / x)

g is smooth through 0 (g(x) = -x/2 + x^2/24 - ...), so this form has neither 0/0 nor cancellation at small gamma, in its
value or in its gradient. Beyond the training length (p >= N) the paper keeps one pseudo score, tau = -(p+1) gamma
(section 4.3), which is n = 1.
"""

import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from sm_flex._checks import (
    check_gamma,
    check_length,
    check_position_values,
    check_positions,
    differentiable,
    plain_eager,
    readable,
)

# x^2, x^4, ... coefficients of log(sinh(x/2) / (x/2)); below |x| = SMALL they are exact to 1e-14.
SERIES = (1 / 24, -1 / 2880, 1 / 181440, -1 / 9676800, 1 / 479001600)
SMALL = 0.5
# From here on e^-gamma is nothing in any float: the row is plain causal, as for gamma = inf.
HUGE = 1e30
# The largest table that is kept to be found again, in elements.
KEPT = 2**22


class Mass(NamedTuple):
    """What log M of a call depends on.

    gamma (0-d or (H,), on the call's device); positions (S,) or (B, S), or None for 0..S-1, or, for rows packed after one
    another, cu_seqlens with each document's first row; length N; and the log of what is added to the mass of gamma, sink
    (0-d, (H,), or broadcastable to (B, H, S)).
    """

    gamma: Tensor
    positions: Tensor | None
    cu_seqlens: Tensor | None
    length: int
    num_queries: int
    sink: Tensor | None = None

    @property
    def learned(self) -> bool:
        """Whether log M gets a gradient."""
        return differentiable(self.gamma, self.sink)

    def table(self, dtype: torch.dtype) -> Tensor:
        """log M, (1, S) or (H, S); (B, 1, S) or (B, H, S) where positions are (B, S)."""
        positions = self.positions
        if positions is None:
            positions = torch.arange(self.num_queries, device=self.gamma.device)
            if self.cu_seqlens is not None:
                positions = positions - self.cu_seqlens[document_of(positions, self.cu_seqlens)]
        # A small table: float64 costs nothing, where there is one.
        precise = dtype if positions.device.type == "mps" else torch.float64
        gamma = self.gamma.to(precise).reshape(-1, 1)
        if positions.dim() == 2:
            positions = positions.unsqueeze(1)
        log_m = _closed_form(gamma, positions, self.length)
        if self.sink is not None:
            sink = self.sink.to(precise)
            log_m = _log_add(log_m, sink.reshape(-1, 1) if sink.dim() < 2 else sink)
        return log_m.to(dtype)

    def shared_table(self, dtype: torch.dtype) -> Tensor:
        """table(dtype), which nobody may write to: on a CPU one of the last few is found again, not computed again.

        The layers of a model, and its training steps, ask for the same table; computing it takes longer than the rest of a
        short call. It is found by value, so that a gamma or positions changed in place are never missed.
        """
        inputs = (self.gamma, self.positions, self.cu_seqlens, self.sink)
        compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if compiling and not self.learned and self.gamma.device.type == "cpu":
            return torch.ops.sm_flex.log_mass_table(*inputs, self.length, self.num_queries, dtype == torch.float64)
        # A trace would keep the table as a constant, and selective checkpointing counts on the same operations each time.
        if self.learned or not plain_eager() or not all(x is None or readable(x) for x in inputs):
            return self.table(dtype)
        key = (dtype, self.length, self.num_queries)
        for known in tuple(_TABLES):  # other threads append
            if known.key == key and all(map(_same, known.inputs, inputs)):
                return known.table
        with torch.inference_mode(False), torch.no_grad():
            copies = tuple(None if x is None else x.detach().clone() for x in inputs)
            table = self.table(dtype)
        if table.numel() <= KEPT:
            _TABLES.append(_Known(key, copies, table))
        return table


@torch.library.custom_op("sm_flex::log_mass_table", mutates_args={}, device_types="cpu")
def _log_mass_table(
    gamma: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    sink: Tensor | None,
    length: int,
    num_queries: int,
    precise: bool,
) -> Tensor:
    """shared_table() in compiled code, which would compute its logarithms anew in each call, one number at a time."""
    dtype = torch.float64 if precise else torch.float32
    mass = Mass(gamma, positions, cu_seqlens, length, num_queries, sink)
    # A tracer that folds constants runs the op itself. A copy: compiled code may write to what an op returns.
    return mass.table(dtype) if torch.compiler.is_compiling() else mass.shared_table(dtype).clone()


@_log_mass_table.register_fake
def _(
    gamma: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    sink: Tensor | None,
    length: int,
    num_queries: int,
    precise: bool,
) -> Tensor:
    rows = (num_queries,) if positions is None else positions.shape
    shape = (*rows[:-1], 1 if gamma.dim() == 0 else gamma.shape[0], rows[-1])
    if sink is not None:
        shape = torch.broadcast_shapes(shape, (sink.numel(), 1) if sink.dim() < 2 else sink.shape)
    return gamma.new_empty(shape, dtype=torch.float64 if precise else torch.float32)


class _Known(NamedTuple):
    key: tuple[torch.dtype, int, int]
    inputs: tuple[Tensor | None, ...]
    table: Tensor


_TABLES: deque[_Known] = deque(maxlen=8)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


def log_mass(gamma: float | Tensor, positions: Tensor, length: int) -> Tensor:
    """log M(p) = log sum_{j=p+1}^{N-1} e^{-j gamma}, in closed form (eq. 8 and section 4.3).

    From the training length on (p >= N) one pseudo score remains, log M = -(p+1) gamma; the row p = N-1 has none.
    Differentiable in gamma: d log M / d gamma at gamma = 0 is -(p+N)/2, and 0 where log M is -inf.

    Args:
        gamma: a number >= 0 (inf allowed), or a floating tensor, 0-d or (H,).
        positions: integer tensor (S,) or (B, S), the position p >= 0 of each query in its own sequence.
        length: N >= 1, the training length.

    Returns:
        (1, S) for a scalar gamma, (H, S) for one gamma a head, with a leading B and so (B, 1, S) or (B, H, S) for (B, S)
        positions. float32, or float64 for a float64 gamma tensor. -inf at p = N-1 and for gamma = inf. Natural log.

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
    return Mass(gamma, positions, None, length, positions.shape[-1]).table(dtype)


def headwise_gamma(num_heads: int) -> Tensor:
    """One gamma a head, by ALiBi's rule for its slopes: 2^(-8h/H) for h = 1..H where H is a power of two.

    Otherwise the slopes of the power of two below H come first, then every other slope of the power of two above (Press
    et al. 2022, get_slopes). This is "head-wise gamma" of the paper's Table 6.

    Args:
        num_heads: H >= 1.

    Returns:
        float32 (H,), on the CPU.

    Example:
        >>> headwise_gamma(2)
        tensor([0.0625, 0.0039])
    """
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an int, got {type(num_heads).__name__}")
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")

    def slopes(power: int) -> list[float]:
        return [2.0 ** (-8 * (h + 1) / power) for h in range(power)]

    below = 1 << (num_heads.bit_length() - 1)
    return torch.tensor(slopes(below) + slopes(2 * below)[0::2][: num_heads - below], dtype=torch.float32)


def document_of(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Which document each packed row belongs to: the last that starts at or before it."""
    last = cu_seqlens.shape[0] - 2
    return (torch.searchsorted(cu_seqlens, rows.to(cu_seqlens.dtype), right=True) - 1).clamp(max=last)


def _closed_form(gamma: Tensor, positions: Tensor, length: int) -> Tensor:
    """log M for gamma (H|1, 1) and positions broadcastable to it, in gamma's dtype; every branch of a where() is finite."""
    positions = positions.long()
    terms = length - 1 - positions  # below 0 from N on, where the one pseudo score -(p+1) gamma remains
    empty = (terms == 0) | (gamma >= HUGE)
    n = terms.clamp(min=1).to(gamma.dtype)
    gamma = torch.where(gamma >= HUGE, 1.0, gamma)
    log_m = -(positions + 1) * gamma + n.log() + _log_ratio(n * gamma) - _log_ratio(gamma)
    return torch.where(empty, -math.inf, log_m)


def _log_add(a: Tensor, b: Tensor) -> Tensor:
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
