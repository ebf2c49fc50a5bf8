"""Tables of log M that were computed before.

The layers of a model, its training steps and the tokens that it writes ask for the same rows, and computing
them takes longer than the rest of a short call. So tables on a CPU are kept. They are found by the values of
gamma, sink and positions, so that one changed in place is noticed.

A decode step has a new position each time. Its row is taken from a table of BLOCK rows around it.
"""

from threading import Lock
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sm_flex.checks.mask import check_position_values
from sm_flex.mass.closed_form import log_add, log_mass_table, sink_by_rows
from sm_flex.runtime import differentiable, plain_eager, readable

# The elements that all tables together may have, and how many tables there may be.
MAX_ELEMENTS, MAX_TABLES = 2**23, 1024
# So many sequences at most take their rows from one table of whole blocks, of at most MAX_SPREAD rows.
FEW, BLOCK, MAX_SPREAD = 64, 256, 4096

Key: TypeAlias = tuple[Any, ...]


class _Kept(NamedTuple):
    """A table, and the values that it was found for. rows: each row of a whole block."""

    positions: Tensor | None
    cu_seqlens: Tensor | None
    table: Tensor
    rows: tuple[Tensor, ...] = ()


class _Tables:
    """The last tables, the oldest first. Threads share them."""

    def __init__(self) -> None:
        self.by_key: dict[Key, _Kept] = {}
        self.elements = 0
        self.lock = Lock()

    def add(self, key: Key, kept: _Kept) -> None:
        if kept.table.numel() > MAX_ELEMENTS // 2:
            return
        with self.lock:
            self._remove(key)
            self.by_key[key] = kept
            self.elements += kept.table.numel()
            while self.elements > MAX_ELEMENTS or len(self.by_key) > MAX_TABLES:
                self._remove(next(iter(self.by_key)))

    def _remove(self, key: Key) -> None:
        known = self.by_key.pop(key, None)
        self.elements -= 0 if known is None else known.table.numel()


_TABLES = _Tables()


class Inputs(NamedTuple):
    """What log_mass_table is given, in its order."""

    gamma: Tensor
    positions: Tensor | None
    cu_seqlens: Tensor | None
    sink: Tensor | None
    length: int
    num_queries: int
    dtype: torch.dtype


def cached_table(inputs: Inputs, heads: int = 0) -> Tensor:
    """log_mass_table of the inputs, with the positions checked. Treat the result as read-only.

    heads: H where the table is for PyTorch's flash attention for CPUs, else 0: it then has H heads and the
        memory of that kernel's lse, (S, H), since sums of the two are slow where their memory differs.
    """
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if compiling and inputs.gamma.device.type == "cpu" and not differentiable(inputs.gamma, inputs.sink):
        return torch.ops.sm_flex.log_mass_table(*inputs, heads)
    # Not cached in a trace, which would hold the table as a constant; nor under a dispatch mode, since
    # selective checkpointing needs the same operations in each run.
    if not plain_eager() or not all(x is None or readable(x) for x in inputs[:4]):
        return _computed(inputs, heads)
    return find_table(inputs, heads)


def find_table(inputs: Inputs, heads: int) -> Tensor:
    """cached_table() for tensors whose values can be read, where nothing looks on."""
    gamma, positions, cu_seqlens, sink, length, num_queries, dtype = inputs
    if differentiable(gamma):
        return _computed(inputs, heads)
    if sink is not None and (sink.dim() > 1 or differentiable(sink)):
        alone = find_table(inputs._replace(sink=None, dtype=torch.float64), 0)
        return _heads_last(log_add(alone, sink_by_rows(sink, torch.float64)).to(dtype), heads)
    known = (_values(gamma), None if sink is None else _values(sink), length, dtype)
    if num_queries == 1 and positions is not None and 0 < positions.numel() <= FEW:
        few = _row(positions, inputs, known) if positions.numel() == 1 else _few_rows(positions, inputs, known)
        if few is not None:
            return few
    shape = None if positions is None else positions.shape
    key = (*known, num_queries, shape, cu_seqlens is None, heads)
    kept = _TABLES.by_key.get(key)
    if kept is not None and _same(kept.positions, positions) and _same(kept.cu_seqlens, cu_seqlens):
        return kept.table
    with torch.inference_mode(False), torch.no_grad():
        places, bounds = [None if x is None else x.detach().clone() for x in (positions, cu_seqlens)]
        table = _computed(inputs._replace(positions=places, cu_seqlens=bounds), heads)
    _TABLES.add(key, _Kept(places, bounds, table))
    return table


def _values(x: Tensor) -> float | tuple[float, ...]:
    return x.item() if x.dim() == 0 else tuple(x.tolist())


def _row(position: Tensor, inputs: Inputs, known: Key) -> Tensor:
    """The row (1|H, 1) at one position."""
    place = int(position.item())
    start = place // BLOCK * BLOCK
    kept = _TABLES.by_key.get((*known, start, BLOCK))
    if kept is None:
        check_position_values(position)
        kept = _blocks(inputs, known, start, BLOCK)
    return kept.rows[place - start]


def _few_rows(positions: Tensor, inputs: Inputs, known: Key) -> Tensor | None:
    """The rows (B, 1|H, 1) at the positions (B, 1) of a few sequences; None where they are too far apart."""
    first, last = [int(x) for x in positions.aminmax()]
    if first < 0:
        check_position_values(positions)
    start, end = first // BLOCK * BLOCK, last // BLOCK * BLOCK + BLOCK
    if end - start > MAX_SPREAD:
        return None
    kept = _TABLES.by_key.get((*known, start, end - start)) or _blocks(inputs, known, start, end - start)
    table = kept.table.index_select(1, positions.reshape(-1) - start)
    return table.t().unsqueeze(-1)


def _blocks(inputs: Inputs, known: Key, start: int, count: int) -> _Kept:
    """The table of whole blocks of rows."""
    with torch.inference_mode(False), torch.no_grad():
        table = log_mass_table(*inputs._replace(positions=torch.arange(start, start + count), cu_seqlens=None))
        kept = _Kept(None, None, table, table.split(1, dim=1) if count == BLOCK else ())
    _TABLES.add((*known, start, count), kept)
    return kept


def _computed(inputs: Inputs, heads: int) -> Tensor:
    if inputs.positions is not None:
        check_position_values(inputs.positions)
    return _heads_last(log_mass_table(*inputs), heads)


def _heads_last(table: Tensor, heads: int) -> Tensor:
    """(..., 1|H, S) as (..., H, S) over (..., S, H) memory."""
    if not heads:
        return table
    return table.expand(*table.shape[:-2], heads, -1).transpose(-1, -2).contiguous().transpose(-1, -2)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


@torch.library.custom_op(
    "sm_flex::log_mass_table",
    mutates_args={},
    device_types="cpu",
    schema="(Tensor gamma, Tensor? positions, Tensor? cu_seqlens, Tensor? sink, SymInt length, SymInt num_queries, "
    "ScalarType dtype, SymInt heads) -> Tensor",
)
def _table_op(*arguments: Any) -> Tensor:
    """cached_table() for compiled code, which would compute the logarithms anew in each call."""
    inputs, heads = Inputs(*arguments[:-1]), arguments[-1]
    # A tracer that folds constants runs the op itself, while is_compiling() is true. In a compiled call the
    # result is a copy, since compiled code may write to what an op returns.
    if torch.compiler.is_compiling():
        return _computed(inputs, heads)
    table = _heads_last(cached_table(inputs, heads), heads)
    return table.clone() if heads else table.clone(memory_format=torch.contiguous_format)


@_table_op.register_fake
def _(*arguments: Any) -> Tensor:
    gamma, positions, _, sink, _, num_queries, dtype, heads = arguments
    rows = (num_queries,) if positions is None else positions.shape
    shape = (*rows[:-1], 1 if gamma.dim() == 0 else gamma.shape[0], rows[-1])
    if sink is not None:
        shape = torch.broadcast_shapes(shape, (sink.numel(), 1) if sink.dim() < 2 else sink.shape)
    return _heads_last(gamma.new_empty(shape, dtype=dtype), heads)
