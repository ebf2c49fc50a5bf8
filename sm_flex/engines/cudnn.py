"""cuDNN's fused attention through PyTorch's aten op."""

from torch import Tensor

from sm_flex.engines import Call, Forward, Gradients, Need, State, refuses_on_cuda, rows_contiguous
from sm_flex.runtime import cudnn_backward_op, cudnn_op
from sm_flex.visibility.bias import flag_or_bias

# With a gradient of lse; the kernel takes 128.
WIDEST_WITH_LSE_GRAD = 120

causality = flag_or_bias


def refuses(need: Need) -> str | None:
    if need.attn_mask is not None and need.attn_mask.requires_grad:
        return "it gives attn_mask no gradient"
    return refuses_on_cuda(need, WIDEST_WITH_LSE_GRAD)


def forward(call: Call) -> Forward:
    q_BHSD, k_BHTD, v_BHTD = [rows_contiguous(x) for x in (call.q, call.k, call.v)]
    out_BHSD, lse_BHS1, _, _, _, _, seed, offset, _ = cudnn_op(
        q_BHSD, k_BHTD, v_BHTD, call.bias, True, call.dropout_p, call.causal, False, scale=call.scale
    )
    return out_BHSD, lse_BHS1.squeeze(-1), (seed, offset)


def backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, state: State, bias_grad: bool) -> Gradients:
    grad_out, q, k, v = [rows_contiguous(x) for x in (grad_out, call.q, call.k, call.v)]
    dq, dk, dv = cudnn_backward_op(
        *(grad_out, q, k, v, out, lse.unsqueeze(-1), *state, call.bias, None, None, q.shape[2], k.shape[2]),
        *(call.dropout_p, call.causal),
        scale=call.scale,
    )
    return dq, dk, dv, None
