"""Packed documents on a CPU: the CPU flash op on one document after another.

The documents' bounds are values of a tensor, so under torch.compile the loop must stay one opaque op.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from sm_flex.engines import Call, Forward, Gradients, Need, State, narrowed, one_head_dim, rows_contiguous
from sm_flex.engines.cpu import DTYPES, with_positive_scale
from sm_flex.engines.varlen import to_bhsd, to_thd
from sm_flex.runtime import cpu_flash_backward_op, cpu_flash_op
from sm_flex.visibility.bias import banded_bias

# A window is cut into blocks of this many rows, so that its bias stays small.
BLOCK = 512


def refuses(need: Need) -> str | None:
    if need.empty:
        return "it takes no empty tensor"
    return None if need.device == "cpu" and need.dtype in DTYPES else "it takes bf16, fp16, fp32 and fp64 on a CPU"


def forward(call: Call) -> Forward:
    q, scale = with_positive_scale(call)
    q, k, v = one_head_dim(q, call.k, call.v)
    out, lse = torch.ops.sm_flex.varlen_cpu(q, k, v, call.cu_q, call.cu_k, call.window, call.right, scale)
    return to_bhsd(narrowed(out, call.v.shape[-1])), lse.unsqueeze(0), ()


def backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, state: State, bias_grad: bool) -> Gradients:
    q, scale = with_positive_scale(call)
    attended = one_head_dim(to_thd(grad_out), q, call.k, call.v, to_thd(out))
    documents = (call.cu_q, call.cu_k, call.window, call.right, scale)
    dq, dk, dv = torch.ops.sm_flex.varlen_cpu_backward(*attended, lse.squeeze(0), *documents)
    dq, dk = [narrowed(x, call.q.shape[-1]) for x in (dq, dk)]
    return dq if scale == call.scale else dq * call.scale, dk, narrowed(dv, call.v.shape[-1]), None


@torch.library.custom_op("sm_flex::varlen_cpu", mutates_args={}, device_types="cpu")
def _varlen_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, window: int, right: int, scale: float
) -> tuple[Tensor, Tensor]:
    out = q.new_zeros(q.shape)
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, keys, causal, bias in _blocks(cu_q, cu_k, window, right, q.dtype):
        block_out, block_lse = cpu_flash_op(
            _slots(q, rows), _slots(k, keys), _slots(v, keys), 0.0, causal, attn_mask=bias, scale=scale
        )
        if bias is not None:
            block_lse = block_lse.masked_fill(torch.isneginf(bias).all(-1), -torch.inf)
        out[rows] = to_thd(block_out)
        lse[:, rows] = block_lse[0]
    return out, lse


@_varlen_cpu.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("sm_flex::varlen_cpu_backward", mutates_args={}, device_types="cpu")
def _varlen_cpu_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    window: int,
    right: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    def gradients(rows: slice, keys: slice, causal: bool, bias: Tensor | None) -> list[Tensor]:
        grads = cpu_flash_backward_op(
            *(_slots(grad_out, rows), _slots(q, rows), _slots(k, keys), _slots(v, keys), _slots(out, rows)),
            *(lse[:, rows].unsqueeze(0), 0.0, causal),
            attn_mask=bias,
            scale=scale,
        )
        return [to_thd(x) for x in grads]

    whole = window == -1 and right <= 0 and torch.equal(cu_q, cu_k) and cu_q[0] == 0 and cu_q[-1] == q.shape[0] == k.shape[0]
    if whole:
        # Documents share no key: their gradients go side by side, one of the three at a time, to hold less at
        # once.
        parts = [gradients(*block) for block in _blocks(cu_q, cu_k, window, right, q.dtype)]
        dq, dk, dv = [torch.cat([part.pop(0) for part in parts]) for _ in range(3)]
        return dq, dk, dv
    # Blocks of a window share keys, so their gradients are summed, in the precision of lse.
    dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape, dtype=lse.dtype), v.new_zeros(v.shape, dtype=lse.dtype)
    for rows, keys, causal, bias in _blocks(cu_q, cu_k, window, right, q.dtype):
        block_dq, block_dk, block_dv = gradients(rows, keys, causal, bias)
        dq[rows] = block_dq
        dk[keys] += block_dk
        dv[keys] += block_dv
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_varlen_cpu_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _blocks(
    cu_q: Tensor, cu_k: Tensor, window: int, right: int, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, bool, Tensor | None]]:
    """(rows, keys, causal, bias) of each part attended by itself: a document, or a block of rows of a window."""
    documents = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    for (first, end), (first_key, end_key) in documents:
        if end == first or end_key == first_key:
            continue
        square = right == 0 and end - first == end_key - first_key
        if window == -1 and (square or right == -1):
            yield slice(first, end), slice(first_key, end_key), square, None
            continue
        # Slot of row i among the document's keys, aligned to the end.
        shift = (end_key - first_key) - (end - first)
        for start in range(first, end, BLOCK):
            stop = min(start + BLOCK, end)
            last = end_key - first_key - 1
            if right != -1:
                last = min(stop - 1 - first + shift + right, last)
            low = 0 if window == -1 else max(start - first + shift - window, 0)
            if last < low:
                continue
            bias = banded_bias(start - first + shift - low, stop - start, last + 1 - low, window, dtype, right)
            yield slice(start, stop), slice(first_key + low, first_key + last + 1), False, bias


def _slots(x_THD: Tensor, part: slice) -> Tensor:
    return rows_contiguous(to_bhsd(x_THD[part]))
