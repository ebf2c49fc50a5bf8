"""Memory-efficient attention through PyTorch's aten op: takes any mask, as a bias that gets its gradient.

Its kernel wants equal head counts (k and v are repeated, dk and dv summed), a log-sum-exp padded to 32 rows,
and the rows of the bias aligned to 16 elements.
"""

import math

from torch import Tensor
from torch.nn.functional import pad

from sm_flex.engines import Call, Forward, Gradients, Need, State, refuses_on_cuda, rows_contiguous
from sm_flex.runtime import efficient_backward_op, efficient_op
from sm_flex.visibility.bias import flag_or_bias

LSE_ALIGNMENT = 32
BIAS_ALIGNMENT = 16

causality = flag_or_bias


def refuses(need: Need) -> str | None:
    return refuses_on_cuda(need)


def forward(call: Call) -> Forward:
    out_BHSD, lse_BHS, seed, offset = efficient_op(
        *_inputs(call), _aligned_bias(call), True, call.dropout_p, call.causal, scale=call.scale
    )
    return out_BHSD, lse_BHS[..., : call.q.shape[2]], (seed, offset)


def backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, state: State, bias_grad: bool) -> Gradients:
    lse = pad(lse, (0, -lse.shape[-1] % LSE_ALIGNMENT), value=math.inf)
    # In bf16 and fp16 the kernel takes H * D for the stride of out's rows, whatever out's strides say. Other
    # memory gives wrong gradients, or is read past its end. This copies nothing where out is the forward's
    # own buffer.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    dq, dk, dv, dbias = efficient_backward_op(
        *(rows_contiguous(grad_out), *_inputs(call), _aligned_bias(call), out, lse, *state),
        *(call.dropout_p, [True, True, True, bias_grad], call.causal),
        scale=call.scale,
    )
    dbias = dbias.sum_to_size(call.bias.shape) if bias_grad and call.bias is not None else None
    return dq, _summed(dk, call.k), _summed(dv, call.v), dbias


def _inputs(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with equal head counts."""
    q, k, v = [rows_contiguous(x) for x in (call.q, call.k, call.v)]
    groups = q.shape[1] // k.shape[1]
    return (q, k, v) if groups == 1 else (q, k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1))


def _summed(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of its repeated heads."""
    return grad if grad.shape[1] == x.shape[1] else grad.unflatten(1, (x.shape[1], -1)).sum(2)


def _aligned_bias(call: Call) -> Tensor | None:
    bias = call.bias
    if bias is None:
        return None
    keys = bias.shape[-1]
    if keys % BIAS_ALIGNMENT:
        bias = pad(bias, (0, -keys % BIAS_ALIGNMENT))[..., :keys]
    return rows_contiguous(bias).expand(*call.q.shape[:2], -1, -1)
