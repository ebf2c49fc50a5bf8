"""One autograd Function for every kernel engine: ordinary causal attention, the remask, and the backward that is free.

Call the library's ordinary backward with out' and lse'. It rebuilds P' = exp(score - lse'), which are StableMask's
probabilities, and delta = rowsum(grad_out * out'), which is what dS = P' * (dP - delta) needs, since the pseudo columns
have value 0. Nothing differentiates through lse.

A loss that reaches lse' adds P' * grad_lse' to dS. No kernel takes that, but delta - grad_lse' in the place of delta is the
same thing, and every kernel computes delta from grad_out and out': widened by columns whose product is
-grad_lse' (in three pieces, so that bf16 holds all of it), while q, k and v are 0 there, they give just that.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from sm_flex.engines import Call, Settings, State, cpu, cudnn, efficient, flash, varlen, varlen_cpu
from sm_flex.epilogue.remask import epilogue, log_mass_grad
from sm_flex.mass.table import Mass
from sm_flex.runtime import differentiable, plain_eager
from sm_flex.visibility.bias import dead_rows

ENGINES: dict[str, ModuleType] = {
    "flash": flash,
    "cudnn": cudnn,
    "efficient": efficient,
    "cpu": cpu,
    "varlen": varlen,
    "varlen_cpu": varlen_cpu,
}
# Columns that a gradient of lse' adds; kernels want a multiple of 8.
WIDENING = 8
PIECES = 3


def attend(
    engine: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mass: Mass | Tensor,
    settings: Settings,
    *,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """out' (B, H, S, D), and lse' (B, H, S) if wanted, by one of the ENGINES; differentiable in q, k, v, bias, gamma and sink.

    mass: what log M depends on, or its table.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    # The kernel works log M out by itself; elsewhere, with a sink, and where log M has a gradient, it is a small table.
    table = mass if isinstance(mass, Tensor) else None
    if isinstance(mass, Mass) and (mass.learned or mass.sink is not None or not q.is_cuda):
        table = mass.shared_table(wide)
    if plain_eager() and not differentiable(q, k, v, bias, table):
        # In a decode step the Function alone would cost more than the attention.
        call = Call(q, k, v, bias, cu_q, cu_k, settings)
        out, lse, _ = _forward(engine, call, mass if table is None else table, want_lse)
        return out, lse if want_lse else None
    gamma, positions, length, restarts = None, None, 0, False
    if isinstance(mass, Mass) and table is None:
        gamma, positions, length, restarts = mass.gamma, mass.positions, mass.length, mass.cu_seqlens is not None
    # Dynamo wants the tensors of an autograd Function to be distinct.
    cu_k = None if cu_k is cu_q else cu_k
    k = k.view_as(k) if k is q else k
    v = v.view_as(v) if v is q or v is k else v
    # lse' is an output even where nobody asked for it, so that a second derivative sees it. Compiled code has none, and would
    # take its gradient, always there when traced, for one of the caller's.
    both = want_lse or not torch.compiler.is_compiling()
    result = _Attend.apply(engine, settings, length, restarts, both, q, k, v, bias, cu_q, cu_k, table, gamma, positions)
    out, lse = result if both else (result, None)
    return out, lse if want_lse else None


def _forward(engine: str, call: Call, mass: Tensor | Mass, want_lse: bool = True) -> tuple[Tensor, Tensor | None, State]:
    """out', lse' and what the engine's backward wants kept."""
    out, lse, state = ENGINES[engine].forward(call)
    if call.bias is not None:
        dead = dead_rows(call.bias, call.settings.causal)
        lse = lse.masked_fill(dead, -torch.inf)
        out = out.masked_fill(dead.unsqueeze(-1), 0.0)
    may_be_dead = call.bias is not None or call.settings.may_be_dead
    out, lse = epilogue(out, lse, mass, in_place=True, may_be_dead=may_be_dead, want_lse=want_lse)
    return out, lse, state


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, engine, settings, length, restarts, both, q, k, v, bias, cu_q, cu_k, table, gamma, positions):
        call = Call(q, k, v, bias, cu_q, cu_q if cu_k is None else cu_k, settings)
        mass = table
        if table is None:
            num_queries = q.shape[0] if q.dim() == 3 else q.shape[2]
            mass = Mass(gamma, positions, cu_q if restarts else None, length, num_queries)
        out, lse, state = _forward(engine, call, mass)
        ctx.engine, ctx.settings = engine, settings
        ctx.save_for_backward(q, k, v, bias, cu_q, cu_k, table, out, lse, *state)
        ctx.set_materialize_grads(False)
        return (out, lse) if both else out

    @staticmethod
    def backward(ctx, *grad_outputs):
        grad_out, grad_lse = grad_outputs if len(grad_outputs) == 2 else (grad_outputs[0], None)
        q, k, v, bias, cu_q, cu_k, table, out, lse, *state = ctx.saved_tensors
        wants = ctx.needs_input_grad
        if grad_out is None and grad_lse is None:
            return (None,) * 14
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        dtable = None
        if table is not None and wants[11]:
            dtable = log_mass_grad(grad_out, out, lse, table, grad_lse)
        kernel_lse = lse
        if bias is not None or ctx.settings.may_be_dead:
            # A dead row without mass: exp(score - lse) must be 0, not NaN.
            kernel_lse = lse.masked_fill(torch.isneginf(lse), torch.inf)
        dim = q.shape[-1]
        call = Call(q, k, v, bias, cu_q, cu_q if cu_k is None else cu_k, ctx.settings)
        if grad_lse is not None:
            call, grad_out, out = _widened(call, grad_out, out, grad_lse)
        dq, dk, dv, dbias = ENGINES[ctx.engine].backward(call, grad_out, out, kernel_lse, tuple(state), wants[8])
        if grad_lse is not None:
            dq, dk, dv = [x[..., :dim] for x in (dq, dk, dv)]
        return None, None, None, None, None, dq, dk, dv, dbias, None, None, dtable, None, None


def _widened(call: Call, grad_out: Tensor, out: Tensor, grad_lse: Tensor) -> tuple[Call, Tensor, Tensor]:
    """The call with columns that put delta - grad_lse' in the place of delta."""
    # A power of two a row keeps large and small gradients within the range of fp16.
    exponent = torch.frexp(grad_lse.detach()).exponent.clamp(-14, 15)
    factor = torch.ldexp(torch.ones_like(grad_lse), exponent).to(out.dtype)
    rest, columns = -grad_lse / factor.to(grad_lse.dtype), []
    for _ in range(PIECES):
        columns.append(rest.to(out.dtype))
        rest = rest - columns[-1].to(rest.dtype)
    extra = pad(torch.stack(columns, dim=-1), (0, WIDENING - PIECES))
    q, k, v = [pad(x, (0, WIDENING)) for x in (call.q, call.k, call.v)]
    factors = factor.unsqueeze(-1).expand_as(extra)
    return (
        call._replace(q=q, k=k, v=v),
        _with_columns(grad_out.to(out.dtype), factors),
        _with_columns(out, extra),
    )


def _with_columns(x_BHSD: Tensor, columns_BHSW: Tensor) -> Tensor:
    """Both side by side, (B, H, S, D + W) over (B, S, H, D + W) memory, as the kernels' own outputs are."""
    return torch.cat([x_BHSD.transpose(1, 2), columns_BHSW.transpose(1, 2)], dim=-1).transpose(1, 2)
