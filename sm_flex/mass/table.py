"""Mass, the form in which log M goes from a StableMask to the epilogue, and the cache of its tables."""

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sm_flex.mass.closed_form import log_mass_table
from sm_flex.runtime import differentiable, plain_eager, readable

# Larger tables than this are not cached, in elements.
MAX_CACHED = 2**22


class Mass(NamedTuple):
    """log M of a call: its table, or what the Triton kernel computes it from.

    The fields have the order of the ops' schema (epilogue/kernel.py), so that a Mass can be splatted into
    them.

    log_mass_HS: the table, (1|H, S) or (B, 1|H, S). Where it is given, the other fields are not used.
    gamma: 0-d or (H,), on the device of the call.
    positions: (S,) or (B, S). None: 0..S-1, restarting at every document of cu_seqlens.
    cu_seqlens: (documents + 1,), the first row of each packed document.
    length: N.
    sink_HS: the part of the table that is the sink's, the log of it, of the same kinds of shape, where the sink
        carries a value. log_mass_HS is then given, and holds the whole mass, this part included.
    sink_value_HD: that value, (H, Dv).
    """

    log_mass_HS: Tensor | None
    gamma: Tensor | None = None
    positions: Tensor | None = None
    cu_seqlens: Tensor | None = None
    length: int = 0
    sink_HS: Tensor | None = None
    sink_value_HD: Tensor | None = None

    def table(self, num_queries: int, dtype: torch.dtype) -> Tensor:
        """The table, for those who cannot compute log M themselves."""
        if self.log_mass_HS is not None:
            return self.log_mass_HS
        assert self.gamma is not None, "a Mass is a table of log M, or the gamma it follows from"
        return log_mass_table(self.gamma, self.positions, self.cu_seqlens, None, self.length, num_queries, dtype)

    def tabled(self, num_queries: int, dtype: torch.dtype) -> "Mass":
        """The same mass as a table."""
        return self if self.log_mass_HS is not None else Mass(self.table(num_queries, dtype))

    def rows(self, start: int, end: int) -> "Mass":
        """Rows start to end of a mass that is a table."""
        assert self.log_mass_HS is not None, "only a table can be cut"
        return Mass(
            _rows(self.log_mass_HS, start, end),
            sink_HS=None if self.sink_HS is None else _rows(self.sink_HS, start, end),
            sink_value_HD=self.sink_value_HD,
        )


def _rows(x: Tensor, start: int, end: int) -> Tensor:
    return x if x.shape[-1] == 1 else x[..., start:end]


def cached_table(
    gamma: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    sink: Tensor | None,
    length: int,
    num_queries: int,
    dtype: torch.dtype,
) -> Tensor:
    """log_mass_table of the arguments. Treat the result as read-only.

    The layers of a model, and its training steps, ask for the same table, and computing it takes longer than
    the rest of a short call. So on a CPU the last 8 tables are cached. They are keyed by the values of the
    inputs, so that a gamma or positions changed in place are noticed.
    """
    inputs = (gamma, positions, cu_seqlens, sink)
    learned = differentiable(gamma, sink)
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if compiling and not learned and gamma.device.type == "cpu":
        return torch.ops.sm_flex.log_mass_table(*inputs, length, num_queries, dtype)
    # Not cached in a trace, which would hold the table as a constant; nor under a dispatch mode, since
    # selective checkpointing needs the same operations in each run.
    if learned or not plain_eager() or not all(x is None or readable(x) for x in inputs):
        return log_mass_table(*inputs, length, num_queries, dtype)
    key = (length, num_queries, dtype)
    for cached in tuple(_CACHE):  # a copy, since other threads append
        if cached.key == key and all(map(_same, cached.inputs, inputs)):
            return cached.table
    with torch.inference_mode(False), torch.no_grad():
        copies = tuple(None if x is None else x.detach().clone() for x in inputs)
        table = log_mass_table(*inputs, length, num_queries, dtype)
    if table.numel() <= MAX_CACHED:
        _CACHE.append(_CachedTable(key, copies, table))
    return table


class _CachedTable(NamedTuple):
    key: tuple[int, int, torch.dtype]
    inputs: tuple[Tensor | None, ...]
    table: Tensor


_CACHE: deque[_CachedTable] = deque(maxlen=8)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


@torch.library.custom_op(
    "sm_flex::log_mass_table",
    mutates_args={},
    device_types="cpu",
    schema="(Tensor gamma, Tensor? positions, Tensor? cu_seqlens, Tensor? sink, SymInt length, SymInt num_queries, "
    "ScalarType dtype) -> Tensor",
)
def _table_op(*inputs: Any) -> Tensor:
    """cached_table() for compiled code, which would compute the logarithms anew in each call."""
    # A tracer that folds constants runs the op itself, while is_compiling() is true. In a compiled call the
    # result is a copy, since compiled code may write to what an op returns.
    return log_mass_table(*inputs) if torch.compiler.is_compiling() else cached_table(*inputs).clone()


@_table_op.register_fake
def _(gamma: Tensor, positions: Tensor | None, _: Any, sink: Tensor | None, length: int, num_queries: int, dtype: Any) -> Tensor:
    rows = (num_queries,) if positions is None else positions.shape
    shape = (*rows[:-1], 1 if gamma.dim() == 0 else gamma.shape[0], rows[-1])
    if sink is not None:
        shape = torch.broadcast_shapes(shape, (sink.numel(), 1) if sink.dim() < 2 else sink.shape)
    return gamma.new_empty(shape, dtype=dtype)
