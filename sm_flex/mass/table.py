"""Mass, what log M of a call depends on, and the table of it."""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from sm_flex.checks.mask import check_gamma, check_length, check_position_values, check_positions
from sm_flex.mass.closed_form import closed_form, document_of, log_add
from sm_flex.runtime import differentiable, plain_eager, readable

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
        log_m = closed_form(gamma, positions, self.length)
        if self.sink is not None:
            sink = self.sink.to(precise)
            log_m = log_add(log_m, sink.reshape(-1, 1) if sink.dim() < 2 else sink)
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
