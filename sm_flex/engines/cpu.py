"""PyTorch's flash attention for CPUs: takes grouped heads, any head dim, and a bias beside its causal flag.

It wants one head dim: where the value's differs, columns of zeros make them equal.
"""

import torch
from torch import Tensor

from sm_flex.engines import (
    Call,
    Forward,
    Gradients,
    Need,
    State,
    narrowed,
    one_head_dim,
    refuses_extras,
    rows_contiguous,
)
from sm_flex.runtime import BEFORE_2_13, cpu_flash_backward_op, cpu_flash_function, cpu_flash_op
from sm_flex.visibility.bias import flag_or_bias, mask_bias

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FEW_QUERIES = 32


def refuses(need: Need) -> str | None:
    extras = refuses_extras(need)
    if extras is not None:
        return extras
    if need.device != "cpu":
        return f"query is on {need.q.device}"
    if need.dropout_p:
        return "it has no dropout"
    if need.attn_mask is not None and need.attn_mask.requires_grad:
        return "it gives attn_mask no gradient"
    if need.dtype == torch.float64 and torch.compiler.is_compiling() and BEFORE_2_13:
        return "compiled in float64 it is NaN on this torch"
    return None if need.dtype in DTYPES else f"it has no {need.dtype}"


def copies_outweigh(need: Need) -> bool:
    """Whether making the head dims equal, of all keys, takes longer than the attention of a few queries itself.

    A decode step against 4k keys, D = 192 and Dv = 128, takes 4.6 times as long as the dense engine in float32.
    At 64 queries it is faster. In bf16 and fp16 it always is, since the dense engine copies keys and values
    too.
    """
    one_dim = need.q.shape[-1] == need.v.shape[-1]
    return not one_dim and need.dtype in (torch.float32, torch.float64) and need.q.shape[-2] < FEW_QUERIES


def causality(attn_mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor | None, bool]:
    """Where S = T a mask goes beside the causal flag, by which the kernel skips the upper triangle."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    if attn_mask is not None and num_queries == num_keys:
        return mask_bias(attn_mask, num_queries, num_keys, q.dtype), num_queries > 1
    return flag_or_bias(attn_mask, q, k)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call of one head dim, without a bias, whose scale is positive."""
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        q, k, v = [rows_contiguous(x) for x in (q, k, v)]
    return cpu_flash_function(q, k, v, 0.0, causal, scale=scale)


def forward(call: Call) -> Forward:
    q, scale = with_positive_scale(call)
    q_BHSD, k_BHTD, v_BHTD = [rows_contiguous(x) for x in one_head_dim(q, call.k, call.v)]
    out_BHSD, lse_BHS = cpu_flash_op(q_BHSD, k_BHTD, v_BHTD, 0.0, call.causal, attn_mask=call.bias, scale=scale)
    return narrowed(out_BHSD, call.v.shape[-1]), lse_BHS, ()


def backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, state: State, bias_grad: bool) -> Gradients:
    q, scale = with_positive_scale(call)
    inputs = one_head_dim(grad_out, q, call.k, call.v, out)
    grad_out, q, k, v = [rows_contiguous(x) for x in inputs[:4]]
    dq, dk, dv = cpu_flash_backward_op(grad_out, q, k, v, inputs[4], lse, 0.0, call.causal, attn_mask=call.bias, scale=scale)
    dq, dk = [narrowed(x, call.q.shape[-1]) for x in (dq, dk)]
    return dq if scale == call.scale else dq * call.scale, dk, narrowed(dv, call.v.shape[-1]), None


def with_positive_scale(call: Call) -> tuple[Tensor, float]:
    """The op gives NaN for a scale that is not positive: then q takes it instead."""
    return (call.q, call.scale) if call.scale > 0 else (call.q * call.scale, 1.0)
