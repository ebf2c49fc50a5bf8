"""The arguments of varlen_attn."""

from typing import Any

import torch
from torch import Tensor

from sm_flex.checks.fits import check_mask_fits
from sm_flex.checks.tensors import check_qkv
from sm_flex.runtime import differentiable, readable
from sm_flex.score_mod import StableMask


def check_varlen(
    query: Any,
    key: Any,
    value: Any,
    cu_q: Any,
    cu_k: Any,
    max_q: Any,
    max_k: Any,
    mask: StableMask,
    window_size: Any,
    enable_gqa: bool,
    paged: dict[str, Any],
) -> None:
    """varlen_attn's arguments with a StableMask. paged: the given ones of seqused_k, block_table and num_splits."""
    if "block_table" not in paged:
        check_qkv(query, key, value, enable_gqa, "THD")
    if differentiable(query, key, value, mask.gamma, mask.sink, mask.sink_value):
        for name in ("block_table", "seqused_k"):
            if name in paged:
                raise NotImplementedError(f"{name} is for inference: call under torch.no_grad()")
    if mask.length is None:
        raise ValueError("length is required by varlen_attn: pass stablemask(gamma, length=N), the training length")
    if mask.score_mod is not None:
        raise NotImplementedError(
            "score_mod inside a StableMask is not taken by varlen_attn, whose kernels have none: use flex_attention with a "
            "document block_mask"
        )
    pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    if not pair or not all(isinstance(x, int) for x in window_size) or window_size[1] != 0 or window_size[0] < -1:
        raise ValueError(
            f"window_size must be (-1, 0) or (W, 0) with a StableMask, which is causal, got {window_size}: pass (-1, 0)"
        )
    for name, cu in (("cu_seq_q", cu_q), ("cu_seq_k", cu_k)):
        if cu is None and name == "cu_seq_k" and paged:
            continue
        check_cu_seqlens(name, cu, query.device)
    _check_documents(query, key, value, cu_q, cu_k, mask, paged)
    check_longest("max_q", max_q, cu_q)
    check_longest("max_k", max_k, cu_k)


def check_cu_seqlens(name: str, cu: Any, device: torch.device, query: str = "query") -> None:
    if not isinstance(cu, Tensor) or cu.dtype != torch.int32:
        raise TypeError(f"{name} must be an int32 tensor, got {cu.dtype if isinstance(cu, Tensor) else type(cu).__name__}")
    if cu.dim() != 1 or cu.shape[0] < 2:
        raise ValueError(f"{name} must be (documents + 1,), got shape {tuple(cu.shape)}")
    if cu.device != device:
        raise ValueError(f"{name} must be on the device of {query}, {device}, got {cu.device}")


def check_cu_values(name: str, cu: Tensor, total: int) -> None:
    if readable(cu) and (cu[0] != 0 or cu[-1] != total or bool((cu.diff() < 0).any())):
        raise ValueError(f"{name} must rise from 0 to the number of rows, {total}, got {cu.tolist()}")


def _check_documents(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor | None, mask: StableMask, paged: dict[str, Any]
) -> None:
    num_queries = query.shape[0]
    num_keys = num_queries if paged else key.shape[0]
    if mask.positions is not None and mask.positions.dim() != 1:
        raise ValueError(f"positions must be (T_q,) = ({num_queries},) for varlen_attn, got {tuple(mask.positions.shape)}")
    if paged and mask.positions is None:
        raise ValueError("positions are required with a paged or padded cache: pass stablemask(..., positions=..., length=...)")
    check_mask_fits(mask, (1, query.shape[1], num_queries), num_keys, query.device, values=value.shape[-2:])
    if cu_k is None or paged:
        return
    if cu_k.shape != cu_q.shape:
        raise ValueError(f"cu_seq_k must have the documents of cu_seq_q, {cu_q.shape[0] - 1}, got {cu_k.shape[0] - 1}")
    for name, cu, total in (("cu_seq_q", cu_q, num_queries), ("cu_seq_k", cu_k, key.shape[0])):
        check_cu_values(name, cu, total)
    if mask.positions is None and cu_k is not cu_q and readable(cu_q) and not torch.equal(cu_q, cu_k):
        raise ValueError(
            "positions are required where a document's query and key lengths differ: "
            "pass stablemask(..., positions=..., length=...)"
        )


def check_longest(name: str, longest: Any, cu: Tensor | None) -> None:
    if isinstance(longest, bool) or not isinstance(longest, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, the longest document's length, got {type(longest).__name__}")
    if cu is not None and readable(cu) and int(cu.diff().max()) > longest:
        raise ValueError(f"{name} must be at least the longest document, {int(cu.diff().max())}, got {longest}")
