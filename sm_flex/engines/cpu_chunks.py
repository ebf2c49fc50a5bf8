"""The CPU engine for a chunk of S queries against T > S keys, in parts that PyTorch's flash op takes without a bias.

With S != T causality would be a bias of S x T. But the first T - S keys are visible to every query, and the
others are a causal square:

    lse = logaddexp(lse_1, lse_2),   out = e^(lse_1 - lse) out_1 + e^(lse_2 - lse) out_2

The backward rebuilds P' = exp(score - lse') and delta from whole rows (autograd.py), so each part has its own,
with the lse' and out' of the whole. There the keys are cut further, to hold less at once.

A mask of one row for all queries goes beside each part as a view. One with a row for each query is a bias, made
for one block of queries at a time.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sm_flex.engines import Call, Forward, Gradients, State, cpu, narrowed, one_head_dim, rows_contiguous
from sm_flex.engines.cpu import with_positive_scale
from sm_flex.epilogue.formula import exp_difference, times_share
from sm_flex.runtime import cpu_flash_backward_op, cpu_flash_op
from sm_flex.visibility.bias import banded_bias, bias_block, fully_masked_rows, mask_bias

# Up to so many queries, and elements of their bias, are one call with a bias; beyond, a block of a mask's rows.
ROWS, BIAS_ELEMENTS = 512, 1 << 20
# How many keys a part of the backward has: a part in so many of all keys, but at least so many.
PARTS, KEYS = 16, 512

refuses = cpu.refuses


class Part(NamedTuple):
    """Queries and keys attended by one call of the op: all of them, or a causal square and queries after it."""

    rows: slice
    keys: slice
    causal: bool
    bias: Tensor | None


def takes(num_queries: int, num_keys: int) -> bool:
    """Whether a call goes in parts. Under torch.compile it has a bias."""
    return num_queries != num_keys and not torch.compiler.is_compiling() and num_queries > rows_together(num_keys)


def rows_together(num_keys: int) -> int:
    return max(1, min(ROWS, BIAS_ELEMENTS // num_keys))


def call_of(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float) -> Call:
    may_be_masked = attn_mask is not None or q.shape[2] > k.shape[2]
    return Call(q, k, v, None, None, None, True, scale, may_be_masked=may_be_masked, attn_mask=attn_mask)


def forward(call: Call) -> Forward:
    """Where two parts were merged, out has the dtype of the scores: autograd.py rounds it once, after the remask."""
    q, scale = with_positive_scale(call)
    q, k, v = [rows_contiguous(x) for x in one_head_dim(q, call.k, call.v)]
    found = []
    for rows, keys, causal, bias in _parts(q, k, call.attn_mask, k.shape[2]):
        tensors = (q[:, :, rows], k[:, :, keys], v[:, :, keys])
        out, lse = cpu_flash_op(*tensors, 0.0, causal, attn_mask=bias, scale=scale)
        if bias is not None:
            lse = lse.masked_fill(_fully_masked(bias, causal), -torch.inf)
        found.append((out, lse))
    outs, lses = zip(*found, strict=True)
    if _by_rows(q, k, call.attn_mask):
        out, lse = torch.cat([x.transpose(1, 2) for x in outs], dim=1).transpose(1, 2), torch.cat(lses, dim=2)
    else:
        lse = torch.logaddexp(*lses)
        first, second = [
            times_share(x.to(lse.dtype), exp_difference(y, lse), y, may_be_masked=call.may_be_masked) for x, y in found
        ]
        out = first + second
    return narrowed(out, call.v.shape[-1]), lse, () if call.attn_mask is None else (call.attn_mask,)


def backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, state: State, bias_grad: bool) -> Gradients:
    q, scale = with_positive_scale(call)
    *inputs, out = one_head_dim(grad_out, q, call.k, call.v, out)
    grad_out, q, k, v = [rows_contiguous(x) for x in inputs]
    mask = state[0] if state else None
    by_rows, num_keys = _by_rows(q, k, mask), k.shape[2]
    # What parts share is summed in the precision of lse: parts of the keys share queries, blocks of rows share
    # keys.
    dtype = lse.dtype if by_rows else k.dtype
    dk, dv = [x.new_zeros(x.transpose(1, 2).shape, dtype=dtype).transpose(1, 2) for x in (k, v)]
    dq = q.new_zeros(q.transpose(1, 2).shape).transpose(1, 2) if by_rows else None
    for rows, keys, causal, bias in _parts(q, k, mask, max(KEYS, -(-num_keys // (PARTS * KEYS)) * KEYS)):
        tensors = (grad_out[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows])
        part_dq, part_dk, part_dv = cpu_flash_backward_op(*tensors, 0.0, causal, attn_mask=bias, scale=scale)
        dk[:, :, keys] += part_dk
        dv[:, :, keys] += part_dv
        del part_dk, part_dv
        if dq is None:
            dq = part_dq.to(lse.dtype)  # a part of the keys that every query sees
        else:
            dq[:, :, rows] += part_dq
        del part_dq
    assert dq is not None, "there is at least one part"
    dq, dk = [narrowed(x, call.q.shape[-1]) for x in (dq, dk)]
    dq = (dq if scale == call.scale else dq * call.scale).to(q.dtype)
    return dq, dk.to(k.dtype), narrowed(dv, call.v.shape[-1]).to(v.dtype), None


def _by_rows(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether the parts are blocks of queries: a mask has a row for each, or the first see no key at all."""
    return q.shape[2] > k.shape[2] or (mask is not None and mask.shape[-2] > 1)


def _parts(q: Tensor, k: Tensor, mask: Tensor | None, keys_together: int) -> Iterator[Part]:
    num_queries, num_keys = q.shape[2], k.shape[2]
    before = num_keys - num_queries
    if _by_rows(q, k, mask):
        step = rows_together(num_keys)
        for start in range(0, num_queries, step):
            end = min(start + step, num_queries)
            keys = max(1, end + before)
            bias = banded_bias(start + before, end - start, keys, -1, q.dtype)
            if mask is not None:
                part = bias_block(mask, start, end, keys)
                bias = torch.where(part, bias, -math.inf) if part.dtype == torch.bool else bias + part
            yield Part(slice(start, end), slice(0, keys), False, bias)
        return
    for low, high in ((0, before), (before, num_keys)):
        for first in range(low, high, keys_together):
            keys, start = slice(first, min(first + keys_together, high)), max(0, first - before)
            bias = None
            if mask is not None:
                part = mask[..., keys] if mask.shape[-1] > 1 else mask
                bias = mask_bias(part, num_queries - start, keys.stop - first, q.dtype)
            yield Part(slice(start, num_queries), keys, first >= before, bias)


def _fully_masked(bias: Tensor, causal: bool) -> Tensor:
    """fully_masked_rows, looking at one row alone where all are one."""
    if not causal and bias.stride(-2) == 0:
        bias = bias[..., :1, :]
    return fully_masked_rows(bias, causal)
