"""FlashAttention through PyTorch's aten op: FA2, or FA3 or FA4 after activate_flash_attention_impl."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from sm_flex.engines import Call, Forward, Gradients, Need, State, refuses_on_cuda, rows_contiguous
from sm_flex.runtime import flash_backward_op, flash_op

# The head dims that the kernels take; FA4's on compute capability 10 stop at 128 (and know 192, of no use here).
WIDEST, WIDEST_OF_FA4_ON_SM100 = 256, 128


def refuses(need: Need) -> str | None:
    if need.attn_mask is not None:
        return "it takes no attn_mask"
    return refuses_on_cuda(need, widest_with_lse_grad(str(need.q.device)) if need.lse_grad else None)


@torch.compiler.assume_constant_result
def widest_with_lse_grad(device: str) -> int:
    """The largest head dim that still fits with the 8 columns of a gradient of lse. Fixed when a call is traced."""
    # torch 2.11 has no other implementations to choose from where it lacks the question.
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    sm100 = current == "FA4" and torch.cuda.get_device_capability(device)[0] == 10
    return (WIDEST_OF_FA4_ON_SM100 if sm100 else WIDEST) - 8


def causality(attn_mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[None, bool]:
    """The kernel aligns causal to the end, as StableMask wants it. A single query sees every key."""
    return None, q.shape[2] > 1


def forward(call: Call) -> Forward:
    q_BHSD, k_BHTD, v_BHTD = [padded(x) for x in (call.q, call.k, call.v)]
    out_BHSD, lse_BHS, _, _, _, _, seed, offset, _ = flash_op(
        q_BHSD, k_BHTD, v_BHTD, call.dropout_p, call.causal, False, scale=call.scale
    )
    if call.may_be_masked:
        lse_BHS = lse_BHS.masked_fill(lse_BHS == math.inf, -math.inf)  # FA2's lse of a fully masked row is +inf
    return unpadded(out_BHSD, call.q.shape[-1]), lse_BHS, (seed, offset)


def backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, state: State, bias_grad: bool) -> Gradients:
    grad_out, q, k, v, out = [padded(x) for x in (grad_out, call.q, call.k, call.v, out)]
    grads = flash_backward_op(
        *(grad_out, q, k, v, out, lse, None, None, q.shape[2], k.shape[2]),
        *(call.dropout_p, call.causal, *state),
        scale=call.scale,
    )
    dq, dk, dv = [unpadded(x, call.q.shape[-1]) for x in grads]
    return dq, dk, dv, None


def padded(x: Tensor) -> Tensor:
    """FA2 wants a head dim that is a multiple of 8. Columns of zeros change no score."""
    x = rows_contiguous(x)
    return pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def unpadded(x: Tensor, dim: int) -> Tensor:
    return x if x.shape[-1] == dim else x[..., :dim]
