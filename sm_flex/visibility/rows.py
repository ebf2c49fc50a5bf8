"""The rule as rows of a boolean mask, for the dense engine."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode

from sm_flex.mass.closed_form import document_of
from sm_flex.runtime import vmap_bhqkv
from sm_flex.visibility.blocks import dense_blocks

# (first row, end row) -> bool, broadcastable to (B, H, rows, T)
VisibleRows = Callable[[int, int], Tensor]


def visible_rows(
    mask: Tensor | BlockMask | None, rows: Sequence[int], num_keys: int, device: torch.device, ordered: bool
) -> VisibleRows:
    """The causal slots of rows (B, H, S), narrowed by a boolean mask of four dimensions or a BlockMask.

    If not ordered, the BlockMask is all there is.
    """
    batch, num_heads, num_queries = rows
    if isinstance(mask, BlockMask):
        return block_mask_rows(mask, num_queries, num_keys, num_heads, batch, ordered)
    return causal_rows(num_queries, num_keys, device) if mask is None else bool_mask_rows(mask, num_queries, num_keys)


def causal_rows(num_queries: int, num_keys: int, device: torch.device) -> VisibleRows:
    """(rows, T), True where key j <= i + T - S."""

    def rows(start: int, end: int) -> Tensor:
        slots = torch.arange(start, end, device=device).unsqueeze(1) + (num_keys - num_queries)
        return torch.arange(num_keys, device=device) <= slots

    return rows


def block_mask_rows(
    block_mask: BlockMask, num_queries: int, num_keys: int, num_heads: int, batch: int, ordered: bool
) -> VisibleRows:
    """A BlockMask, within the causal slots if ordered: all of a full block, of a partial one what mask_mod keeps."""
    device = block_mask.kv_num_blocks.device
    causal = causal_rows(num_queries, num_keys, device)
    block_q, block_kv = block_mask.BLOCK_SIZE
    blocks = -(-num_keys // block_kv)
    partial = dense_blocks(block_mask.kv_num_blocks, block_mask.kv_indices, blocks)
    full = None
    if block_mask.full_kv_num_blocks is not None:
        full = dense_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, blocks)
    mask_mod = vmap_bhqk(block_mask.mask_mod)
    b, h, kv = [torch.arange(n, device=device) for n in (batch, num_heads, num_keys)]

    def rows(start: int, end: int) -> Tensor:
        q = torch.arange(start, end, device=device)

        def spread(dense: Tensor) -> Tensor:
            return dense[:, :, q // block_q][..., kv // block_kv]

        seen = spread(partial) & mask_mod(b, h, q, kv)
        if full is not None:
            seen = seen | spread(full)
        return seen & causal(start, end) if ordered else seen

    return rows


def vmap_bhqk(mod: Callable[..., Tensor], scored: bool = False) -> Callable[..., Tensor]:
    """A mask_mod or score_mod over ranges of (b, h, q_idx, kv_idx), as torch's flex_attention maps it."""
    mapped = vmap_bhqkv(mod, prefix=(0,) if scored else ())

    def call(*args: Tensor) -> Tensor:
        with _IndexByTensors():
            return mapped(*args)

    return call


class _IndexByTensors(TorchFunctionMode):
    """table[b, h] under vmap by aten.index, since indexing by a 0-d tensor would ask for its value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if all(isinstance(i, Tensor) for i in index):
                return torch.ops.aten.index(args[0], index)
        return func(*args, **(kwargs or {}))


def document_rows(cu_q: Tensor, cu_k: Tensor, num_queries: int, num_keys: int, window: int, right: int = 0) -> VisibleRows:
    """Packed documents: a query sees the slots of its own document, aligned to the end, within the window.

    window, right: how many keys before and after its own it sees, -1 for all.
    """
    kv = torch.arange(num_keys, device=cu_k.device)
    document_kv = document_of(kv, cu_k)

    def rows(start: int, end: int) -> Tensor:
        q = torch.arange(start, end, device=cu_q.device)
        document_q = document_of(q, cu_q)
        slot = (q - cu_q[document_q + 1] + cu_k[document_q + 1]).unsqueeze(1)
        # Rows after the last document, if any, see nothing, and nobody sees the keys after it.
        seen = (document_q.unsqueeze(1) == document_kv) & (q < cu_q[-1]).unsqueeze(1) & (kv < cu_k[-1])
        if right != -1:
            seen = seen & (kv <= slot + right)
        return seen if window == -1 else seen & (kv >= slot - window)

    return rows


def bool_mask_rows(attn_mask: Tensor, num_queries: int, num_keys: int) -> VisibleRows:
    """A boolean attn_mask within the causal slots."""
    causal = causal_rows(num_queries, num_keys, attn_mask.device)

    def rows(start: int, end: int) -> Tensor:
        part = attn_mask[..., start:end, :] if attn_mask.shape[-2] > 1 else attn_mask
        return causal(start, end) & part

    return rows
