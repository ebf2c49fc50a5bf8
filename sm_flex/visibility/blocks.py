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
    tensors). Handed back, it is returned as it is, so that a caller can keep it across graphs.
    """
    if block_mask is not None and _is_narrowed(block_mask, (num_queries, num_keys)):
        return block_mask  # and not cached, where it would keep itself alive
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
        source = _contents(block_mask)
        cached = _NARROWED.get(block_mask)
        if cached is None or not _same(cached[0], source):
            cached = _NARROWED[block_mask] = (source, _narrow(block_mask, num_queries, num_keys, device))
        return cached[1]


_NARROWED: "weakref.WeakKeyDictionary[BlockMask, tuple[tuple[Any, ...], BlockMask]]" = weakref.WeakKeyDictionary()
_PLAIN: dict[tuple[int, int, torch.device], BlockMask] = {}


def _narrow(block_mask: BlockMask | None, num_queries: int, num_keys: int, device: torch.device) -> BlockMask:
    if block_mask is None:
        return _causal(num_queries, num_keys, device)
    block_q, block_kv = block_mask.BLOCK_SIZE
    offset = num_keys - num_queries
    first_row = torch.arange(-(-num_queries // block_q), device=device).unsqueeze(1) * block_q
    last_row = (first_row + block_q - 1).clamp(max=num_queries - 1)
    first_key = torch.arange(-(-num_keys // block_kv), device=device) * block_kv
    touches = first_key <= last_row + offset
    inside = first_key + block_kv - 1 <= first_row + offset
    listed = dense_blocks(block_mask.kv_num_blocks, block_mask.kv_indices, first_key.shape[0])
    full = torch.zeros_like(listed)
    if block_mask.full_kv_num_blocks is not None:
        full = dense_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, first_key.shape[0])
    partial = (listed & touches) | (full & touches & ~inside)
    full = full & inside
    within, sizes = _within(block_mask.mask_mod, offset), (num_queries, num_keys)
    options: Any = {"BLOCK_SIZE": (block_q, block_kv), "mask_mod": within, "seq_lengths": sizes}
    return _marked(BlockMask.from_kv_blocks(*_ordered(partial), *_ordered(full), **options), sizes)


def _causal(num_queries: int, num_keys: int, device: torch.device) -> BlockMask:
    """The causal slots alone. Each list is a range, so nothing is sorted, nor scattered.

    Row block r sees the key blocks before full_to[r] whole, and those from there to seen_to[r] in part. Key
    block c is seen whole from row block full_from[c] on, and in part from seen_from[c] to there.
    """
    size, offset = DEFAULT_BLOCK, num_keys - num_queries
    row_block = torch.arange(-(-num_queries // size), device=device)
    key_block = torch.arange(-(-num_keys // size), device=device)
    rows, keys = row_block.shape[0], key_block.shape[0]
    last_row = (row_block * size + size - 1).clamp(max=num_queries - 1)
    full_to = ((row_block * size + offset + 1).clamp(min=0) // size).clamp(max=keys)
    seen_to = (last_row + offset).clamp(min=-1) // size + 1
    full_from = (-((offset - key_block * size - size + 1) // size)).clamp(min=0, max=rows)
    seen_from = ((key_block * size - offset) // size).clamp(min=0, max=rows)

    def ranges(first: Tensor, count: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """A BlockMask's (num_blocks, indices): the count blocks from first on, then the others."""
        indices = (first.unsqueeze(-1) + order) % order.shape[0]
        return count.to(torch.int32)[None, None], indices.to(torch.int32)[None, None]

    none = torch.zeros_like
    lists = (
        *ranges(full_to, seen_to - full_to, key_block),
        *ranges(none(full_to), full_to, key_block),
        *ranges(seen_from, full_from - seen_from, row_block),
        *ranges(full_from, rows - full_from, row_block),
    )
    sizes = (num_queries, num_keys)
    return _marked(BlockMask(sizes, *lists, BLOCK_SIZE=(size, size), mask_mod=_within(noop_mask, offset)), sizes)


def _marked(narrowed: BlockMask, sizes: tuple[int, int]) -> BlockMask:
    """Handed back, it is not narrowed again: see _is_narrowed."""
    narrowed.narrowed_as = (*sizes, *_contents(narrowed))  # pyright: ignore[reportAttributeAccessIssue]
    return narrowed


def _is_narrowed(block_mask: BlockMask, sizes: tuple[int, int]) -> bool:
    """Whether it came from here, for these lengths, and has had neither its mask_mod nor its lists replaced."""
    mark = getattr(block_mask, "narrowed_as", None)
    return mark is not None and mark[:2] == sizes and _same(mark[2:], _contents(block_mask))


def _contents(block_mask: BlockMask) -> tuple[Any, ...]:
    return (block_mask.mask_mod, block_mask.kv_indices, block_mask.full_kv_indices)


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return not [x for x, y in zip(a, b, strict=True) if x is not y]


def _within(mask_mod: Any, offset: int) -> Any:
    """mask_mod within the causal slots."""
    if offset == 0:

        def within(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return mask_mod(b, h, q_idx, kv_idx) & (kv_idx <= q_idx)
    else:

        def within(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return mask_mod(b, h, q_idx, kv_idx) & (kv_idx <= q_idx + offset)

    return within


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
