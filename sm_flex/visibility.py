"""Who sees whom, by slot: key j is visible to query i when j <= i + (T - S), and a mask narrows that.

Positions play no part here; they feed the mass. Three forms of the same rule: a bias for kernels that add one, rows of a
boolean mask for the dense engine, block indices for flex.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, _vmap_for_bhqkv, noop_mask
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sm_flex.mass import document_of

# (first row, end row) -> bool, broadcastable to (B, H, rows, T)
VisibleRows = Callable[[int, int], Tensor]

DEFAULT_BLOCK = 128
# Elements of a mask that are looked at together.
BLOCK_ELEMENTS = 1 << 20


def causal_bias(attn_mask: Tensor | None, num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """attn_mask narrowed to the causal slots, as a bias (1|B, 1|H, S, T) with -inf where nothing is seen.

    A floating attn_mask keeps its dtype: rounded to bf16, -300.4 is -300.
    """
    causal = causal_rows(num_queries, num_keys, device)(0, num_queries).reshape(1, 1, num_queries, num_keys)
    if attn_mask is not None and attn_mask.is_floating_point():
        return torch.where(causal, attn_mask, -math.inf)
    seen = causal if attn_mask is None else causal & attn_mask
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -math.inf)


def mask_bias(attn_mask: Tensor, num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor:
    """attn_mask as a bias (1|B, 1|H, S, T) for a kernel that is causal by itself; a broadcast mask stays a view."""
    bias = attn_mask
    if attn_mask.dtype == torch.bool:
        bias = torch.zeros(attn_mask.shape, dtype=dtype, device=attn_mask.device).masked_fill_(~attn_mask, -math.inf)
    return bias.expand(*bias.shape[:2], num_queries, num_keys)


def dead_rows(bias: Tensor, causal: bool) -> Tensor:
    """(1|B, 1|H, S), True where the bias, or it and the kernel's own causality, leave a row nothing to see."""
    num_queries, num_keys = bias.shape[-2:]

    def rows(start: int, end: int) -> Tensor:
        unseen = torch.isneginf(bias[..., start:end, :])
        return (unseen | ~causal_rows(num_queries, num_keys, bias.device)(start, end) if causal else unseen).all(-1)

    if bias.stride(-2) == 0 and num_queries > 1:
        seen = ~torch.isneginf(bias[..., 0, :])
        return seen.cumsum(-1) == 0 if causal else ~seen.any(-1, keepdim=True).expand(*seen.shape[:-1], num_queries)
    if torch.compiler.is_compiling():  # fused, and a number of blocks that follows the length would compile anew for each
        return rows(0, num_queries)
    step = max(1, BLOCK_ELEMENTS // max(1, num_keys * bias.shape[0] * bias.shape[1]))
    return torch.cat([rows(start, min(start + step, num_queries)) for start in range(0, num_queries, step)], dim=-1)


def visible_rows(
    mask: Tensor | BlockMask | None,
    batch: int,
    num_heads: int,
    num_queries: int,
    num_keys: int,
    device: torch.device,
    ordered: bool,
) -> VisibleRows:
    """The causal slots, narrowed by a BlockMask (which is all there is if not ordered) or a boolean mask of four dimensions."""
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
    """A BlockMask (within the causal slots if ordered): each pair of a full block, and what mask_mod keeps of a partial one."""
    device = block_mask.kv_num_blocks.device
    causal = causal_rows(num_queries, num_keys, device)
    block_q, block_kv = block_mask.BLOCK_SIZE
    blocks = -(-num_keys // block_kv)
    partial = _dense_blocks(block_mask.kv_num_blocks, block_mask.kv_indices, blocks)
    full = None
    if block_mask.full_kv_num_blocks is not None:
        full = _dense_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, blocks)
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


def narrow_block_mask(block_mask: BlockMask | None, num_queries: int, num_keys: int, device: torch.device) -> BlockMask:
    """block_mask (or everything) within the causal slots, from block indices alone: nothing is evaluated on S x T.

    Kept for the next call, but for what belongs to a trace or a dispatch mode (fake tensors).
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
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
        kept = _NARROWED.get(block_mask)
        if kept is None or any(a is not b for a, b in zip(kept[0], source, strict=True)):
            kept = _NARROWED[block_mask] = (source, _narrow(block_mask, num_queries, num_keys, device))
        return kept[1]


def vmap_bhqk(mod: Callable[..., Tensor], scored: bool = False) -> Callable[..., Tensor]:
    """A mask_mod or score_mod over ranges of (b, h, q_idx, kv_idx), as torch's flex_attention maps it."""
    mapped = _vmap_for_bhqkv(mod, prefix=(0,) if scored else ())

    def call(*args: Tensor) -> Tensor:
        with _IndexByTensors():
            return mapped(*args)

    return call


class _IndexByTensors(TorchFunctionMode):
    """table[b, h] under vmap: aten.index, where indexing by a 0-d tensor would ask for its value. It has a gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if all(isinstance(i, Tensor) for i in index):
                return torch.ops.aten.index(args[0], index)
        return func(*args, **(kwargs or {}))


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
        listed = _dense_blocks(block_mask.kv_num_blocks, block_mask.kv_indices, first_key.shape[0])
        full = torch.zeros_like(listed)
        if block_mask.full_kv_num_blocks is not None:
            full = _dense_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, first_key.shape[0])
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
        *_ordered(partial),
        *_ordered(full),
        BLOCK_SIZE=(block_q, block_kv),
        mask_mod=within,
        seq_lengths=(num_queries, num_keys),
    )


def _dense_blocks(num_blocks: Tensor, indices: Tensor | None, columns: int) -> Tensor:
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


def banded_bias(first_slot: int, num_rows: int, num_keys: int, window: int, dtype: torch.dtype) -> Tensor:
    """(1, 1, rows, keys) on the CPU: row r sits at slot first_slot + r and sees the keys of its last ``window`` and itself."""
    slots = torch.arange(first_slot, first_slot + num_rows).unsqueeze(1)
    keys = torch.arange(num_keys)
    seen = keys <= slots
    if window != -1:
        seen = seen & (keys >= slots - window)
    return torch.zeros(1, 1, num_rows, num_keys, dtype=dtype).masked_fill_(~seen, -math.inf)


def document_rows(cu_q: Tensor, cu_k: Tensor, num_queries: int, num_keys: int, window: int) -> VisibleRows:
    """Packed documents as rows of a mask: a query sees its own document's slots, aligned to the end, within the window."""
    kv = torch.arange(num_keys, device=cu_k.device)
    document_kv = document_of(kv, cu_k)

    def rows(start: int, end: int) -> Tensor:
        q = torch.arange(start, end, device=cu_q.device)
        document_q = document_of(q, cu_q)
        slot = (q - cu_q[document_q + 1] + cu_k[document_q + 1]).unsqueeze(1)
        seen = (document_q.unsqueeze(1) == document_kv) & (kv <= slot)
        return seen if window == -1 else seen & (kv >= slot - window)

    return rows


def bool_mask_rows(attn_mask: Tensor, num_queries: int, num_keys: int) -> VisibleRows:
    """A boolean attn_mask within the causal slots."""
    causal = causal_rows(num_queries, num_keys, attn_mask.device)

    def rows(start: int, end: int) -> Tensor:
        part = attn_mask[..., start:end, :] if attn_mask.shape[-2] > 1 else attn_mask
        return causal(start, end) & part

    return rows
