"""FlashAttention on documents packed after one another, through the op that torch's varlen_attn is made of.

q, k, v are (T, H, D) as there; out and lse leave as (1, H, T, D) and (1, H, T), views of the kernel's own buffers.
"""

import math

import torch
import torch.nn.attention.varlen
from torch import Tensor

from sm_flex.engines import Call, Forward, Gradients, Settings, State
from sm_flex.engines.flash import padded, unpadded


def forward(call: Call, **newer: object) -> Forward:
    """newer: keywords that only newer torch has (seqused_k, block_table, num_splits), where the caller gave them."""
    at, dim = call.settings, call.q.shape[-1]
    q, k, v = [padded(x) for x in (call.q, call.k, call.v)]
    out, lse, rng = torch.ops.torch_attn._varlen_attn(q, k, v, call.cu_q, call.cu_k, at.max_q, at.max_k, *_causal(at), **newer)
    if at.may_be_dead:
        lse = lse.masked_fill(lse == math.inf, -math.inf)  # +inf is FA2's lse of a row that sees nothing
    return to_bhsd(unpadded(out, dim)), lse.unsqueeze(0), (rng,)


def backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, state: State, want_bias: bool) -> Gradients:
    at, dim = call.settings, call.q.shape[-1]
    grad_out, q, k, v, out = [padded(x) for x in (to_thd(grad_out), call.q, call.k, call.v, to_thd(out))]
    is_causal, scale, window = _causal(at)
    grads = torch.ops.torch_attn._varlen_attn_backward(
        grad_out, q, k, v, out, lse.squeeze(0), call.cu_q, call.cu_k, at.max_q, at.max_k, is_causal, state[0], scale, window
    )
    dq, dk, dv = [unpadded(x, dim) for x in grads]
    return dq, dk, dv, None


def to_bhsd(x_THD: Tensor) -> Tensor:
    return x_THD.transpose(0, 1).unsqueeze(0)


def to_thd(x_1HTD: Tensor) -> Tensor:
    return x_1HTD.squeeze(0).transpose(0, 1)


def _causal(at: Settings) -> tuple[bool, float, list[int]]:
    """(is_causal, scale, window_size) as varlen_attn derives them."""
    return at.window == -1, at.scale, [at.window, 0]
