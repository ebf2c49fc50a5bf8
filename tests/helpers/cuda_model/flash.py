"""FlashAttention 2 as PyTorch calls it: dense, and on documents packed after one another.

lse is the natural log-sum-exp, +inf for a fully masked row, whose out is 0 (flash_attn/softmax.h: normalize_softmax_lse;
flash_fwd_kernel.h stores 0 and INFINITY where a block has no key). Causality is aligned to the end (mask.h). The backward
turns -inf in lse into 0 (softmax.h: scale_apply_exp2), which FA3 does not promise: here it gives NaN.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.helpers.cuda_model import contract
from tests.helpers.cuda_model.attention import (
    Dropout,
    Scores,
    backward,
    bottom_right,
    drawn,
    forward,
    row_sums,
    summed,
    uninitialised,
)

NO_DROPOUT = Dropout(0.0, 0, 0)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    contract.flash_forward(query, key, value, dropout_p, is_causal)
    seed, offset = drawn(dropout_p)
    dropout = Dropout(dropout_p, seed, offset)
    new_out, lse, masked = forward(_scores(query, key, is_causal, scale), value, dropout)
    out = uninitialised(query.transpose(1, 2)).transpose(1, 2)  # flash_api.cpp: empty_like(q) in (B, S, H, D)
    out.copy_(new_out.masked_fill(masked.unsqueeze(-1), 0.0))
    state = torch.tensor([seed, offset], dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    lengths = query.shape[2], key.shape[2]
    return out, lse.masked_fill(masked, math.inf), None, None, *lengths, *state, query.new_empty(0)


def sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    ends = (cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, philox_seed, philox_offset)
    contract.flash_backward(grad_out, query, key, value, out, logsumexp, *ends)
    dropout = Dropout(dropout_p, *philox_seed.tolist())
    delta = row_sums(out, grad_out)
    dq, dk, dv, _ = backward(_scores(query, key, is_causal, scale), value, grad_out, delta, logsumexp, dropout)
    heads = key.shape[1]
    dk, dv = [summed(x, heads, query.dtype) for x in (dk, dv)]
    return tuple(uninitialised(x).copy_(grad) for x, grad in ((query, dq), (key, dk), (value, dv)))


def packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, ...]:
    ends = (cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal)
    contract.packed_forward(query, key, value, *ends, return_debug_mask)
    contract.need(seqused_k is None and block_table is None and alibi_slopes is None, "the model has no paged cache")
    # mha_varlen_fwd: both are empty, so that rows beyond the last document are not written.
    out, lse = uninitialised(query), torch.full((query.shape[1], query.shape[0]), math.nan)
    for rows, keys in _documents(cum_seq_q, cum_seq_k, max_q, max_k):
        visible = _window(rows, keys, is_causal, window_size_left, window_size_right)
        q, k, v = [_one(x, part) for x, part in ((query, rows), (key, keys), (value, keys))]
        new_out, new_lse, masked = forward(Scores(q, k, _scale(scale, query), visible), v, NO_DROPOUT)
        out[rows] = new_out.masked_fill(masked.unsqueeze(-1), 0.0)[0].transpose(0, 1).to(out.dtype)
        lse[:, rows] = new_lse.masked_fill(masked, math.inf)[0]
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), query.new_empty(0)


def packed_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    ends = (cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state, unused)
    contract.packed_backward(grad_out, query, key, value, out, logsumexp, *ends)
    dq, dk, dv = [uninitialised(x) for x in (query, key, value)]  # mha_varlen_bwd: empty_like
    for rows, keys in _documents(cum_seq_q, cum_seq_k, max_q, max_k):
        visible = _window(rows, keys, is_causal, window_size_left, window_size_right)
        q, do, o = [_one(x, rows) for x in (query, grad_out, out)]
        k, v = [_one(x, keys) for x in (key, value)]
        lse = logsumexp[:, rows].unsqueeze(0)
        grads = backward(Scores(q, k, _scale(scale, query), visible), v, do, row_sums(o, do), lse, NO_DROPOUT)
        new_dk, new_dv = [summed(x, key.shape[1], query.dtype) for x in grads[1:3]]
        for grad, part, new in ((dq, rows, grads[0]), (dk, keys, new_dk), (dv, keys, new_dv)):
            grad[part] = new[0].transpose(0, 1).to(grad.dtype)
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, is_causal: bool, scale: float | None) -> Scores:
    rows, keys = q.shape[2], k.shape[2]
    causal = is_causal and rows > 1  # flash_api.cpp: a single query turns is_causal off
    return Scores(q, k, _scale(scale, q), bottom_right(rows, keys) if causal else None)


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _documents(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Iterator[tuple[slice, slice]]:
    for (first, end), (first_key, end_key) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        contract.need(end - first <= max_q and end_key - first_key <= max_k, "a document is longer than max_q or max_k")
        yield slice(first, end), slice(first_key, end_key)


def _window(rows: slice, keys: slice, causal: bool, left: int | None, right: int | None) -> Tensor:
    """(S, T) of one document, aligned to the end (mask.h). -1 and None are unbounded; causal is a right window of 0."""
    num_rows, num_keys = rows.stop - rows.start, keys.stop - keys.start
    slot = torch.arange(num_rows).unsqueeze(1) + num_keys - num_rows
    distance = torch.arange(num_keys) - slot
    right = 0 if causal else right
    seen = torch.ones(num_rows, num_keys, dtype=torch.bool)
    if right is not None and right >= 0:
        seen &= distance <= right
    if left is not None and left >= 0:
        seen &= distance >= -left
    return seen


def _one(x: Tensor, part: slice) -> Tensor:
    """The rows of one document, (1, H, S, D)."""
    return x[part].transpose(0, 1).unsqueeze(0)
