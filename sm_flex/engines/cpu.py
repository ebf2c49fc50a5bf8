"""PyTorch's flash attention for CPUs: takes grouped heads, any head dim and a bias, with or without is_causal."""

import torch
from torch import Tensor

from sm_flex.engines import Call, Forward, Gradients, State, rows_contiguous

aten = torch.ops.aten


def forward(call: Call) -> Forward:
    at = call.settings
    q, k, v = [rows_contiguous(x) for x in (call.q, call.k, call.v)]
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, at.causal, attn_mask=call.bias, scale=at.scale)
    return out, lse, ()


def backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, state: State, want_bias: bool) -> Gradients:
    at = call.settings
    grad_out, q, k, v = [rows_contiguous(x) for x in (grad_out, call.q, call.k, call.v)]
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, at.causal, attn_mask=call.bias, scale=at.scale
    )
    return dq, dk, dv, None
