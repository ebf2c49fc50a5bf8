"""cuDNN's fused attention as PyTorch calls it. What it leaves in a fully masked row is not documented: NaN here."""

import math
from typing import Any

import torch
from torch import Tensor

from tests.helpers.cuda_model import contract
from tests.helpers.cuda_model.attention import (
    Dropout,
    Scores,
    backward,
    drawn,
    forward,
    memory_of,
    row_sums,
    summed,
    top_left,
    uninitialised,
)

# cudnn/MHA.cpp: backward graphs are kept, and found again by q, k, v and the bias; the strides of out are those of the call
# that built the graph. (The key of torch 2.14 takes three more tensors; which ones, its binary does not say. grad_out comes
# in the strides of whoever calls, for torch's own attention too, so those are not held against a call.)
GRAPHS: dict[Any, tuple[int, ...]] = {}


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    contract.cudnn_forward(query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal)
    seed, offset = drawn(dropout_p)
    dropout = Dropout(dropout_p, seed, offset)
    new_out, lse, masked = forward(_scores(query, key, attn_bias, is_causal, scale), value, dropout)
    out = _as_query_lies(query, value.shape[-1])
    out.copy_(new_out.masked_fill(masked.unsqueeze(-1), math.nan))
    lengths = query.shape[2], key.shape[2]
    state = torch.tensor(seed), torch.tensor(offset)
    return out, lse.masked_fill(masked, math.nan).unsqueeze(-1), None, None, *lengths, *state, None


def sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    attn_bias: Tensor | None,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    ends = (philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal)
    contract.cudnn_backward(grad_out, query, key, value, out, logsumexp, *ends)
    tensors = (query, key, value) if attn_bias is None else (query, key, value, attn_bias)
    graph = (query.dtype, dropout_p, is_causal, *((tuple(x.shape), x.stride()) for x in tensors))
    o = memory_of(out, tuple(out.shape), GRAPHS.setdefault(graph, out.stride()), "cudnn: out")
    dropout = Dropout(dropout_p, int(philox_seed), int(philox_offset))
    scores = _scores(query, key, attn_bias, is_causal, scale)
    dq, dk, dv, _ = backward(scores, value, grad_out, row_sums(o, grad_out), logsumexp.squeeze(-1), dropout)
    dk, dv = [summed(x, key.shape[1], query.dtype) for x in (dk, dv)]
    return tuple(uninitialised(x).copy_(grad) for x, grad in ((query, dq), (key, dk), (value, dv)))


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None) -> Scores:
    visible = top_left(q.shape[2], k.shape[2]) if is_causal else None  # SDPA_attributes: set_causal_mask
    return Scores(q, k, q.shape[-1] ** -0.5 if scale is None else scale, visible, bias)


def _as_query_lies(query: Tensor, value_dim: int) -> Tensor:
    """MHA.cpp: alloc_with_matching_layout, dimensions in the order of q's strides."""
    shape = (*query.shape[:3], value_dim)
    order = sorted(range(4), key=query.stride, reverse=True)
    inverse = [order.index(i) for i in range(4)]
    return torch.full([shape[i] for i in order], math.nan, dtype=query.dtype).permute(inverse)
