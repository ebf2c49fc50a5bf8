"""Who sees whom in flash-attn's terms: one span of keys for each query, low <= key < high.

Causality, windows, documents, left padding and a cache that is filled in part are all spans, so that no mask of
S x T elements is ever made for them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sm_flex.mass.closed_form import document_of
from sm_flex.visibility.rows import VisibleRows


class Spans(NamedTuple):
    """low, high: the keys low <= key < high that each query sees. slot: the key that a query stands at.

    All of them are integers, (S,), or (B, S) where the rows of the batch differ.
    """

    low: Tensor
    high: Tensor
    slot: Tensor

    def rows(self, num_keys: int) -> VisibleRows:
        """For the dense engine: rows of a boolean mask, (1|B, 1, rows, T)."""
        keys = torch.arange(num_keys, device=self.slot.device)

        def rows(start: int, end: int) -> Tensor:
            tables = [x if x.dim() == 2 else x.unsqueeze(0) for x in (self.low, self.high)]
            low, high = [x[:, None, start:end, None] for x in tables]
            return (keys >= low) & (keys < high)

        return rows

    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """For torch's flex_attention."""

        def seen(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (kv_idx >= at(self.low, b, q_idx)) & (kv_idx < at(self.high, b, q_idx))

        return seen


def at(table: Tensor, b: Tensor, q_idx: Tensor) -> Tensor:
    """The element of a table (S,) or (B, S)."""
    return table[q_idx] if table.dim() == 1 else table[b, q_idx]


def spans_of(slot: Tensor, first: int | Tensor, end: int | Tensor, left: int, right: int) -> Spans:
    """Within the keys first <= key < end, those up to left before the query's slot and right after it; -1 for all."""
    zero = torch.zeros_like(slot)
    low = zero + first if left == -1 else torch.maximum(slot - left, zero + first)
    high = zero + end if right == -1 else torch.minimum(slot + right + 1, zero + end)
    return Spans(low, high, slot)


def document_spans(cu_q: Tensor, cu_k: Tensor, num_queries: int, left: int, right: int) -> tuple[Spans, Tensor]:
    """The spans of packed documents, each document's queries at the end of its keys, and the document of each query."""
    rows = torch.arange(num_queries, device=cu_q.device)
    document = document_of(rows, cu_q)
    first, end = cu_k[document].long(), cu_k[document + 1].long()
    end = torch.where(rows < cu_q[-1], end, first)  # rows after the last document, if any, see nothing
    return spans_of(rows - cu_q[document + 1] + end, first, end, left, right), document
