"""The tensors and options of a call, against each other."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sm_flex.runtime import check_no_transform


def broadcasts(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Whether a tensor of the shape is broadcastable to the full one."""
    return len(shape) <= len(full) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(full), strict=False))


def check_qkv(query: Any, key: Any, value: Any, enable_gqa: bool, layout: str) -> None:
    """query, key and value against each other; layout is "BHSD" or "THD"."""
    check_no_transform()
    dims, heads_dim = len(layout), layout.index("H")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != dims:
            raise ValueError(f"{name} must be {dims}-D, ({', '.join(layout)}), with a StableMask, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got dtype {x.dtype}")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise ValueError(f"{name} must have the dtype of query, {query.dtype}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {x.device}")
        if layout == "BHSD" and x.shape[0] != query.shape[0]:
            raise ValueError(f"{name} must have the batch size of query, {query.shape[0]}, got {x.shape[0]}")
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"value must have the batch, heads and length of key, {tuple(key.shape[:-1])}, got {tuple(value.shape[:-1])}"
        )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have the head dim of query, {query.shape[-1]}, got {key.shape[-1]}")
    heads, kv_heads = query.shape[heads_dim], key.shape[heads_dim]
    if heads != kv_heads and not enable_gqa:
        raise ValueError(f"key must have the {heads} heads of query, got {kv_heads}: pass enable_gqa=True for grouped queries")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of key heads, got {heads} and {kv_heads}")


def check_scale(scale: Any) -> None:
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat))):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")


def check_visible(visible: Any, query: Tensor, key: Tensor) -> None:
    if isinstance(visible, BlockMask):
        check_block_mask(visible, query, key, "visible")
    elif not isinstance(visible, Tensor):
        raise TypeError(f"visible must be a boolean tensor, a BlockMask or None, got {type(visible).__name__}")
    elif visible.dtype != torch.bool:
        raise TypeError(
            f"visible must be a boolean tensor, a BlockMask or None, got dtype {visible.dtype}: what is added to the scores "
            "is an inner score_mod, stablemask(..., score_mod=...)"
        )
    else:
        check_attn_mask(visible, query, key, "visible")


def check_attn_mask(attn_mask: Any, query: Tensor, key: Tensor, name: str = "attn_mask") -> None:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor or None, got {type(attn_mask).__name__}")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask must be boolean or floating, got dtype {attn_mask.dtype}")
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in (query.dtype, torch.float32):
        raise ValueError(f"attn_mask must be boolean or of query's dtype, {query.dtype}, got {attn_mask.dtype}")
    if attn_mask.device != query.device:
        raise ValueError(f"{name} must be on the device of query, {query.device}, got {attn_mask.device}")
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if attn_mask.dim() == 0 or not broadcasts(attn_mask.shape, full):
        way_out = ": a (B, T) padding mask goes in as mask[:, None, None, :]" if attn_mask.dim() == 2 else ""
        raise ValueError(f"{name} must be broadcastable to (B, H, S, T) = {full}, got {tuple(attn_mask.shape)}{way_out}")


def check_dropout(dropout_p: Any) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:  # NaN too
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")


def check_block_mask(block_mask: Any, query: Tensor, key: Tensor, name: str = "block_mask") -> None:
    """A BlockMask against (B, H, S, D) query and key."""
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"{name} must be a BlockMask or None, got {type(block_mask).__name__}")
    if block_mask.kv_num_blocks.device != query.device:
        raise ValueError(f"{name} must be on the device of query, {query.device}, got {block_mask.kv_num_blocks.device}")
    expected, shape = (query.shape[2], key.shape[2]), tuple(block_mask.seq_lengths)
    if shape[0] != expected[0] or shape[1] != expected[1]:
        raise ValueError(
            f"{name} must be for (S, T) = {expected}, got {shape}: build it with create_block_mask for these lengths"
        )
    batch, heads = block_mask.kv_num_blocks.shape[:2]
    if batch not in (1, query.shape[0]) or heads not in (1, query.shape[1]):
        raise ValueError(f"{name} must be for (1|B, 1|H) of {tuple(query.shape[:2])}, got {(batch, heads)}")


def check_aux(return_aux: Any, kind: type) -> None:
    if return_aux is not None and not isinstance(return_aux, kind):
        raise TypeError(f"return_aux must be an AuxRequest or None, got {type(return_aux).__name__}")


def check_kernel_options(kernel_options: Any) -> None:
    if kernel_options is not None and not isinstance(kernel_options, dict):
        raise TypeError(f"kernel_options must be a dict or None, got {type(kernel_options).__name__}")
