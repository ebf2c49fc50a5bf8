"""FlashAttention on documents packed after one another, through the op that torch's varlen_attn is made of.

out and lse leave as (1, H, S, D) and (1, H, S), which are views of the kernel's own buffers.
"""

import math

import torch
from torch import Tensor

from sm_flex.engines import Call, Forward, Gradients, Need, State, narrowed, one_head_dim
from sm_flex.engines.flash import WIDEST, padded, widest_with_lse_grad
from sm_flex.runtime import varlen_backward_op, varlen_op


def refuses(need: Need) -> str | None:
    if need.empty:
        return "it takes no empty tensor"
    if need.device != "cuda" or need.dtype not in (torch.float16, torch.bfloat16):
        return "it takes bf16 and fp16 on CUDA"
    widest = widest_with_lse_grad(str(need.q.device)) if need.lse_grad else WIDEST
    return None if need.widest <= widest else f"it takes head dims up to {widest}"


def forward(call: Call, **new_keywords: object) -> Forward:
    """new_keywords: the given ones of seqused_k, block_table and num_splits, which only newer torch has."""
    q_SHD, k_THD, v_THD = [padded(x) for x in one_head_dim(call.q, call.k, call.v)]
    documents = (call.cu_q, call.cu_k, call.max_q, call.max_k)
    out_SHD, lse_HS, rng = varlen_op(
        q_SHD, k_THD, v_THD, *documents, _is_causal(call), call.scale, [call.window, call.right], **new_keywords
    )
    if call.may_be_masked:
        lse_HS = lse_HS.masked_fill(lse_HS == math.inf, -math.inf)  # FA2's lse of a fully masked row is +inf
    return to_bhsd(narrowed(out_SHD, call.v.shape[-1])), lse_HS.unsqueeze(0), (rng,)


def backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, state: State, bias_grad: bool) -> Gradients:
    inputs = one_head_dim(to_thd(grad_out), call.q, call.k, call.v, to_thd(out))
    grad_out, q, k, v, out = [padded(x) for x in inputs]
    documents = (call.cu_q, call.cu_k, call.max_q, call.max_k)
    grads = varlen_backward_op(
        *(grad_out, q, k, v, out, lse.squeeze(0), *documents), _is_causal(call), state[0], call.scale, [call.window, call.right]
    )
    dq, dk, dv = grads
    dim = call.q.shape[-1]
    return narrowed(dq, dim), narrowed(dk, dim), narrowed(dv, call.v.shape[-1]), None


def to_bhsd(x_THD: Tensor) -> Tensor:
    return x_THD.transpose(0, 1).unsqueeze(0)


def to_thd(x_1HTD: Tensor) -> Tensor:
    return x_1HTD.squeeze(0).transpose(0, 1)


def _is_causal(call: Call) -> bool:
    """As varlen_attn derives it: a window of its own makes a row causal already."""
    return (call.window, call.right) == (-1, 0)
