"""FlashAttention through PyTorch's aten op, and so FA3 or FA4 once activate_flash_attention_impl has put them behind it.

Causal with S != T is aligned to the end, as StableMask wants it. It takes no mask.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from sm_flex.engines import Call, Forward, Gradients, State, rows_contiguous

aten = torch.ops.aten


def forward(call: Call) -> Forward:
    at, dim = call.settings, call.q.shape[-1]
    q, k, v = [padded(x) for x in (call.q, call.k, call.v)]
    out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(
        q, k, v, at.dropout_p, at.causal, False, scale=at.scale
    )
    if at.may_be_dead:
        lse = lse.masked_fill(lse == math.inf, -math.inf)  # +inf is FA2's lse of a row that sees nothing
    return unpadded(out, dim), lse, (seed, offset)


def backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, state: State, want_bias: bool) -> Gradients:
    at, dim = call.settings, call.q.shape[-1]
    grad_out, q, k, v, out = [padded(x) for x in (grad_out, call.q, call.k, call.v, out)]
    grads = aten._scaled_dot_product_flash_attention_backward(
        grad_out, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], at.dropout_p, at.causal, *state, scale=at.scale
    )
    dq, dk, dv = [unpadded(x, dim) for x in grads]
    return dq, dk, dv, None


def padded(x: Tensor) -> Tensor:
    """FA2 wants a head dim that is a multiple of 8; zeros change no score."""
    x = rows_contiguous(x)
    return pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def unpadded(x: Tensor, dim: int) -> Tensor:
    return x if x.shape[-1] == dim else x[..., :dim]
