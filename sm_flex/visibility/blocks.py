"""The rule as block indices, for torch's flex kernels."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, noop_mask

from sm_flex.runtime import watched

DEFAULT_BLOCK = 128


def narrow_block_mask(block_mask: BlockMask | None, num_queries: int, num_keys: int, device: torch.device) -> BlockMask:
    """block_mask (or everything) within the causal slots, from block indices alone.

    Nothing is evaluated on S x T. The result is cached, except in a trace or under a dispatch mode (fake
    tensors).
    """
    if torch.compiler.is_compiling() or watched():
        return _narrow(block_mask, num_queries, num_keys, device)
    with torch.inference_mode(False):  # or a later training step could not use it
        if block_mask is None:
            key = (num_queries, num_keys, device)
            if key not in _PLAIN:
                if len(_PLAIN) >= 16:
                    _PLAIN.clear()
                _PLAIN[key] = _narrow(None, num_queries, num_keys, device)
            return _PLAIN[key]
        # A BlockMask may be given another mask_mod or other lists after it was made.
        source = (block_mask.mask_mod, block_mask.kv_indices, block_mask.full_kv_indices)
        cached = _NARROWED.get(block_mask)
        if cached is None or any(a is not b for a, b in zip(cached[0], source, strict=True)):
            cached = _NARROWED[block_mask] = (source, _narrow(block_mask, num_queries, num_keys, device))
        return cached[1]


_NARROWED: "weakref.WeakKeyDictionary[BlockMask, tuple[tuple[Any, ...], BlockMask]]" = weakref.WeakKeyDictionary()
_PLAIN: dict[tuple[int, int, torch.device], BlockMask] = {}


def _narrow(block_mask: BlockMask | None, num_queries: int, num_keys: int, device: torch.device) -> BlockMask:
    block_q, block_kv = (DEFAULT_BLOCK, DEFAULT_BLOCK) if block_mask is None else block_mask.BLOCK_SIZE
    offset = num_keys - num_queries
    first_row = torch.arange(-(-num_queries // block_q), device=device).unsqueeze(1) * block_q
    last_row = (first_row + block_q - 1).clamp(max=num_queries - 1)
    first_key = torch.arange(-(-num_keys // block_kv), device=device) * block_kv
    touches = first_key <= last_row + offset
    inside = first_key + block_kv - 1 <= first_row + offset
    if block_mask is None:
        full = inside.reshape(1, 1, *inside.shape)
        partial = (touches & ~inside).reshape(1, 1, *inside.shape)
    else:
        listed = dense_blocks(block_mask.kv_num_blocks, block_mask.kv_indices, first_key.shape[0])
        full = torch.zeros_like(listed)
        if block_mask.full_kv_num_blocks is not None:
            full = dense_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, first_key.shape[0])
        partial = (listed & touches) | (full & touches & ~inside)
        full = full & inside
    mask_mod = noop_mask if block_mask is None else block_mask.mask_mod

    if num_queries == num_keys:

        def within(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return mask_mod(b, h, q_idx, kv_idx) & (kv_idx <= q_idx)
    else:

        def within(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return mask_mod(b, h, q_idx, kv_idx) & (kv_idx <= q_idx + offset)

    return BlockMask.from_kv_blocks(
        *_ordered(partial), *_ordered(full), BLOCK_SIZE=(block_q, block_kv), mask_mod=within, seq_lengths=(num_queries, num_keys)
    )


def dense_blocks(num_blocks: Tensor, indices: Tensor | None, columns: int) -> Tensor:
    """(B, H, rows, columns) bool from a BlockMask's ordered lists."""
    assert indices is not None, "a BlockMask has both or neither of its full block lists"
    listed = torch.arange(indices.shape[-1], device=indices.device) < num_blocks.unsqueeze(-1)
    target = torch.where(listed, indices, columns).long()
    dense = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.bool, device=indices.device)
    return dense.scatter(-1, target, True)[..., :columns]


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """A BlockMask's (num_blocks, indices) from (B, H, rows, columns) bool."""
    ones = dense.to(torch.int32)
    indices = torch.argsort(ones, dim=-1, descending=True, stable=True)
    return ones.sum(-1).to(torch.int32), indices.to(torch.int32).contiguous()
