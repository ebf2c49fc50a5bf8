"""A call of the drop-ins as the diagnostics take it: checked, and walked through by blocks of rows."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sm_flex.checks.fits import check_mask_fits
from sm_flex.checks.packed import check_cu_seqlens, check_cu_values
from sm_flex.checks.tensors import check_qkv, check_scale, check_visible
from sm_flex.engines import dense
from sm_flex.epilogue.formula import real_share_and_lse
from sm_flex.runtime import autocast, no_autocast, score_dtype, score_scale
from sm_flex.score_mod import StableMask
from sm_flex.visibility.rows import VisibleRows, document_rows, visible_rows


class CheckedCall(NamedTuple):
    """A call that was checked."""

    query: Tensor
    key: Tensor
    mask: StableMask | None
    scale: float
    rows: VisibleRows
    log_mass: Tensor  # broadcastable to (B, H, S)


def read(
    query: Tensor,
    key: Tensor,
    mask: StableMask | None,
    scale: float | None,
    visible: Tensor | BlockMask | None,
    cu_seqlens: Tensor | None,
) -> CheckedCall:
    if mask is not None and not isinstance(mask, StableMask):
        raise TypeError(
            f"mask must be a StableMask, or None for plain causal attention, got {type(mask).__name__}: make one with "
            "stablemask(gamma, length=N)"
        )
    query, key = autocast(query, key)
    check_qkv(query, key, key, True, "BHSD")
    check_scale(scale)
    num_queries, num_keys, device = query.shape[2], key.shape[2], query.device
    if mask is not None:
        block_mask = visible if isinstance(visible, BlockMask) else None
        check_mask_fits(mask, query.shape[:3], num_keys, device, block_mask, values=None)
    if visible is not None:
        check_visible(visible, query, key)
    if isinstance(visible, Tensor):
        visible = visible.reshape((1,) * (4 - visible.dim()) + visible.shape)
    rows = visible_rows(visible, query.shape[:3], num_keys, device, mask is None or mask.ordered)
    if cu_seqlens is not None:
        rows = _within_documents(rows, cu_seqlens, mask, num_queries, num_keys, device)
    if mask is None:
        log_mass = torch.full((1, num_queries), -math.inf, dtype=score_dtype(query), device=device)
    else:
        with torch.no_grad():
            mass = mask.mass(device, num_queries, num_keys, score_dtype(query), cu_seqlens)
            log_mass = mass.table(num_queries, score_dtype(query))
    return CheckedCall(query, key, mask, score_scale(scale, query.shape[-1]), rows, log_mass)


def _within_documents(
    rows: VisibleRows, cu_seqlens: Tensor, mask: StableMask | None, num_queries: int, num_keys: int, device: torch.device
) -> VisibleRows:
    check_cu_seqlens("cu_seqlens", cu_seqlens, device)
    if mask is not None and not mask.ordered:
        raise ValueError("cu_seqlens is for rows in order: with ordered=False visible alone says who sees whom")
    if num_queries != num_keys:
        raise ValueError(
            f"cu_seqlens is for equal query and key lengths, got S={num_queries}, T={num_keys}: say with visible which "
            "keys each query sees"
        )
    check_cu_values("cu_seqlens", cu_seqlens, num_keys)
    if mask is not None and mask.length is None:
        raise ValueError("length is required with cu_seqlens: pass stablemask(gamma, length=N), the training length")
    documents = document_rows(cu_seqlens, cu_seqlens, num_queries, num_keys, -1)
    return lambda start, end: rows(start, end) & documents(start, end)


def check_count(name: str, x: object, least: int) -> None:
    """An int, or None where the argument may be left out."""
    if x is not None and (isinstance(x, bool) or not isinstance(x, int) or x < least):
        raise ValueError(f"{name} must be an int >= {least}, got {x!r}")


def by_rows(call: CheckedCall, look: Callable[[Tensor, Tensor], Tensor], *columns: int) -> Tensor:
    """(B, H, S, *columns): look(weights, share) of each block of rows.

    weights (B, H, rows, T) are those of the real scores alone, share is (B, H, rows).
    """
    query, key, mask, scale, rows, log_mass = call
    batch, heads, num_queries, _ = query.shape
    result = torch.empty(batch, heads, num_queries, *columns, dtype=log_mass.dtype, device=query.device)
    with torch.no_grad(), no_autocast(query.device):
        score_mod = None if mask is None else mask.score_mod
        weigh, wide_k = dense.weights_by_rows(rows, scale=scale, score_mod=score_mod), key.to(log_mass.dtype)
        for start, end in dense.row_blocks(batch, heads, num_queries, key.shape[2]):
            weights, lse = weigh(query[:, :, start:end], wide_k, start)
            result[:, :, start:end] = look(weights, real_share_and_lse(lse, log_mass[..., start:end], return_lse=False)[0])
    return result
