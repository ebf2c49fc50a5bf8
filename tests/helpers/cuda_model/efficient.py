"""The memory-efficient (cutlass) kernel as PyTorch calls it.

A fully masked row's lse is 0 (kernel_forward.h: "We set fully masked out rows to 0", log(1)); -inf before torch 2.6, which no
caller can tell from the rest either. Its out is not promised: NaN here.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.helpers.cuda_model import contract
from tests.helpers.cuda_model.attention import Dropout, Scores, backward, drawn, forward, memory_of, row_sums, top_left

BIAS_ALIGNMENT = 16  # attention_backward.cu: alignTo


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    contract.efficient_forward(query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal)
    seed, offset = drawn(dropout_p)
    dropout = Dropout(dropout_p, seed, offset)
    new_out, new_lse, masked = forward(_scores(query, key, attn_bias, is_causal, scale), value, dropout)
    batch, heads, rows = query.shape[:3]
    out = _in_bshd_memory(batch, heads, rows, value.shape[-1], query.dtype)
    out.copy_(new_out.masked_fill(masked.unsqueeze(-1), math.nan))
    # kernel_forward.h: rows from num_queries to lse_dim are +inf.
    lse = torch.full((batch, heads, -(-rows // contract.LSE_ALIGNMENT) * contract.LSE_ALIGNMENT), math.inf)
    lse[..., :rows] = new_lse.masked_fill(masked, 0.0)
    return out, lse, torch.tensor(seed), torch.tensor(offset)


def sdpa_backward(
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    dropout_p: float,
    grad_input_mask: Sequence[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor | None, ...]:
    ends = (philox_seed, philox_offset, dropout_p, grad_input_mask, is_causal)
    contract.efficient_backward(grad_out_, query, key, value, attn_bias, out, logsumexp, *ends)
    batch, heads, rows, dim = out.shape
    # attention_backward.cu: grad_out.contiguous() in (B, S, H, D). kernel_backward.h: out by the strides of its batch and
    # heads alone in half precision; in float32 PyTorch computes delta.
    if query.dtype in contract.HALF:
        out = memory_of(out, (batch, heads, rows, dim), (out.stride(0), out.stride(1), heads * dim, 1), "efficient: out")
    padded = logsumexp.shape[-1]
    whole = memory_of(logsumexp, (batch, heads, padded), (*logsumexp.stride()[:2], 1), "efficient: lse")
    contract.need(bool((whole[..., rows:] == math.inf).all()), "efficient: lse is padded with +inf")
    delta, dropout = row_sums(out, grad_out_), Dropout(dropout_p, int(philox_seed), int(philox_offset))
    scores = _scores(query, key, attn_bias, is_causal, scale)
    *grads, ds = backward(scores, value, grad_out_, delta, whole[..., :rows], dropout)
    sizes = [(x.shape[2], x.shape[3]) for x in (query, key, value)]
    results = [_in_bshd_memory(batch, heads, *size, query.dtype).copy_(grad) for size, grad in zip(sizes, grads, strict=True)]
    if attn_bias is None or not grad_input_mask[3]:
        return (*results, None)
    keys = key.shape[2]
    dbias = torch.full((batch, heads, rows, -(-keys // BIAS_ALIGNMENT) * BIAS_ALIGNMENT), math.nan, dtype=attn_bias.dtype)
    return (*results, dbias[..., :keys].copy_(ds))


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None) -> Scores:
    visible = top_left(q.shape[2], k.shape[2]) if is_causal else None  # attention.cu: CausalFromTopLeft
    return Scores(q, k, q.shape[-1] ** -0.5 if scale is None else scale, visible, bias)


def _in_bshd_memory(batch: int, heads: int, rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.full((batch, rows, heads, dim), math.nan, dtype=dtype).transpose(1, 2)
