"""Memory-efficient attention through PyTorch's aten op: takes any mask as a bias, and gives the bias its gradient.

Its kernel wants equal head counts (k and v are repeated, dk and dv summed), a log-sum-exp padded to 32 rows and the rows of
the bias aligned to 16 elements.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from sm_flex.engines import Call, Forward, Gradients, State, rows_contiguous

aten = torch.ops.aten
LSE_ALIGNMENT = 32
BIAS_ALIGNMENT = 16


def forward(call: Call) -> Forward:
    at = call.settings
    out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
        *_inputs(call), _aligned_bias(call), True, at.dropout_p, at.causal, scale=at.scale
    )
    return out, lse[..., : call.q.shape[2]], (seed, offset)


def backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, state: State, want_bias: bool) -> Gradients:
    at = call.settings
    lse = pad(lse, (0, -lse.shape[-1] % LSE_ALIGNMENT), value=math.inf)
    # In bf16 and fp16 the kernel takes H * D for the stride of out's rows, whatever out says: other memory gives wrong
    # gradients, or reads past its end. No copy where out is the forward's own buffer.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    dq, dk, dv, dbias = aten._scaled_dot_product_efficient_attention_backward(
        rows_contiguous(grad_out), *_inputs(call), _aligned_bias(call), out, lse, *state, at.dropout_p,
        [True, True, True, want_bias], at.causal, scale=at.scale,
    )  # fmt: skip
    if want_bias and call.bias is not None:
        return dq, _summed(dk, call.k), _summed(dv, call.v), dbias.sum_to_size(call.bias.shape)
    return dq, _summed(dk, call.k), _summed(dv, call.v), None


def _inputs(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = [rows_contiguous(x) for x in (call.q, call.k, call.v)]
    groups = q.shape[1] // k.shape[1]
    return (q, k, v) if groups == 1 else (q, k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1))


def _summed(grad: Tensor, x: Tensor) -> Tensor:
    return grad if grad.shape[1] == x.shape[1] else grad.unflatten(1, (x.shape[1], -1)).sum(2)


def _aligned_bias(call: Call) -> Tensor | None:
    bias = call.bias
    if bias is None:
        return None
    keys = bias.shape[-1]
    if keys % BIAS_ALIGNMENT:
        bias = pad(bias, (0, -keys % BIAS_ALIGNMENT))[..., :keys]
    return rows_contiguous(bias).expand(*call.q.shape[:2], -1, -1)
