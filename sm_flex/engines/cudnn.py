"""cuDNN's fused attention through PyTorch's aten op. Causal is aligned to the start, so causal calls have S = T."""

import torch
from torch import Tensor

from sm_flex.engines import Call, Forward, Gradients, State, rows_contiguous

aten = torch.ops.aten


def forward(call: Call) -> Forward:
    at = call.settings
    q, k, v = [rows_contiguous(x) for x in (call.q, call.k, call.v)]
    out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
        q, k, v, call.bias, True, at.dropout_p, at.causal, False, scale=at.scale
    )
    return out, lse.squeeze(-1), (seed, offset)


def backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, state: State, want_bias: bool) -> Gradients:
    at = call.settings
    grad_out, q, k, v = [rows_contiguous(x) for x in (grad_out, call.q, call.k, call.v)]
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        grad_out, q, k, v, out, lse.unsqueeze(-1), *state, call.bias, None, None, q.shape[2], k.shape[2],
        at.dropout_p, at.causal, scale=at.scale,
    )  # fmt: skip
    return dq, dk, dv, None
