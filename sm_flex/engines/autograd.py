"""One autograd Function for every kernel engine: causal attention, the remask, and a backward that is free.

Call the library's ordinary backward with out' and lse'. It rebuilds P' = exp(score - lse'), which are
StableMask's probabilities, and delta = rowsum(grad_out * out'), which is what dS = P' * (dP - delta) needs,
since the pseudo columns have value 0. Nothing differentiates through lse. Nor does a sink's value change any
of this: out' holds its part of delta.

A loss that reaches lse' adds P' * grad_lse' to dS. No kernel takes that, but delta - grad_lse' in the place
of delta gives the same. Every kernel computes delta from grad_out and out'. So both are widened by columns
whose product is -grad_lse' (in three parts, so that bf16 holds all of it), and q, k and v by columns of 0.

torch.compile makes every gradient that enters an autograd Function contiguous. Kernels lay their out out as
(B, S, H, D), the projection after it leaves its gradient so, and their backward wants it there. So the Function
returns (B, S, H, D), and attend() transposes it: a contiguous gradient is one that nobody has to copy.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sm_flex.engines import Call, Kernel, State, cpu, cpu_chunks, cudnn, efficient, flash, varlen, varlen_cpu
from sm_flex.epilogue.remask import epilogue, epilogue_in_place, log_mass_grad, sink_value_grads
from sm_flex.mass.table import Mass
from sm_flex.runtime import differentiable, plain_eager
from sm_flex.visibility.bias import fully_masked_rows

KERNELS: dict[str, Kernel] = {
    "flash": flash,
    "cudnn": cudnn,
    "efficient": efficient,
    "cpu": cpu,
    "cpu_chunks": cpu_chunks,
    "varlen": varlen,
    "varlen_cpu": varlen_cpu,
}
# How many columns a gradient of lse' adds, of which PARTS are not 0. Kernels want a multiple of 8.
WIDENING = 8
PARTS = 3
# What the Function takes, one after the other, and where those stand that have a gradient.
ARGUMENTS = ("engine", "return_lse", *Call._fields, *Mass._fields)
INPUTS = [ARGUMENTS.index(name) for name in ("q", "k", "v", "bias", "log_mass_HS", "sink_HS", "sink_value_HD")]


def attend(engine: str, call: Call, mass: Mass, *, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """out' (B, H, S, D), and lse' (B, H, S) if wanted, by one of the KERNELS.

    Differentiable in q, k, v, bias and log M, and in a sink and its value.
    """
    if plain_eager() and not differentiable(call.q, call.k, call.v, call.bias, mass.log_mass_HS, mass.sink_value_HD):
        # In a decode step the Function alone would cost more than the attention.
        out, lse, _ = forward(engine, call, mass, return_lse)
        return out, lse if return_lse else None
    q, k, v = call.q, call.k, call.v
    # Dynamo wants the tensors of an autograd Function to be distinct. cu_k and mass.cu_seqlens may be cu_q
    # again.
    k = k.view_as(k) if k is q else k
    v = v.view_as(v) if v is q or v is k else v
    call = call._replace(k=k, v=v, cu_k=None if call.cu_k is call.cu_q else call.cu_k)
    mass = mass if mass.cu_seqlens is None else mass._replace(cu_seqlens=None)
    # Eager: always return lse', so that a second derivative is refused. Compiled: there is no second
    # derivative, and AOTAutograd would hand us a gradient for an lse' that no caller asked for.
    with_lse = return_lse or not torch.compiler.is_compiling()
    result = _Attend.apply(engine, with_lse, *call, *mass)
    out_BSHD, lse = result if with_lse else (result, None)
    return out_BSHD.transpose(1, 2), lse if return_lse else None


def attend_planned(
    q: Tensor, k: Tensor, v: Tensor, mass: Mass, causal: bool, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """attend() of a call that has a plan, by a Mass that is a table."""
    log_mass, sink, value = mass.log_mass_HS, mass.sink_HS, mass.sink_value_HD
    if differentiable(q, k, v, log_mass, value):
        out, lse = _Planned.apply(causal, scale, q, k, v, log_mass, sink, value)
        return out, lse if return_lse else None
    out, lse = cpu.attention(q, k, v, causal, scale)
    out, lse = epilogue_in_place(out, lse, mass, may_be_masked=False, return_lse=return_lse)
    return out, lse if return_lse else None


def forward(engine: str, call: Call, mass: Mass, return_lse: bool = True) -> tuple[Tensor, Tensor | None, State]:
    """out', lse' and what the engine's backward wants kept, without autograd."""
    out, lse, state = KERNELS[engine].forward(call)
    may_be_masked = call.bias is not None or call.may_be_masked
    if call.bias is not None:
        lse = lse.masked_fill(fully_masked_rows(call.bias, call.causal), -torch.inf)
    elif engine == "varlen" and mass.log_mass_HS is not None:
        # The kernel leaves out and lse of rows after the last document as it found them. A NaN there would
        # reach the gradient of log M, to which every row adds.
        assert call.cu_q is not None, "packed documents have bounds"
        lse = lse.masked_fill(torch.arange(lse.shape[-1], device=lse.device) >= call.cu_q[-1], -torch.inf)
        may_be_masked = True
    out, lse = epilogue(out, lse, mass, in_place=True, may_be_masked=may_be_masked, return_lse=return_lse)
    return out if out.dtype == call.q.dtype else out.to(call.q.dtype), lse, state


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, engine: str, return_lse: bool, *arguments: Any) -> Any:
        call, mass = Call(*arguments[: len(Call._fields)]), Mass(*arguments[len(Call._fields) :])
        inputs = (call.q, call.k, call.v, call.bias, call.cu_q, call.cu_k, mass.log_mass_HS, mass.sink_HS, mass.sink_value_HD)
        if call.cu_q is not None and mass.log_mass_HS is None and mass.positions is None:
            mass = mass._replace(cu_seqlens=call.cu_q)
        out, lse, state = forward(engine, _with_cu_k(call), mass)
        out_BSHD = out.transpose(1, 2)
        ctx.engine, ctx.call = engine, call._replace(q=None, k=None, v=None, bias=None, cu_q=None, cu_k=None, attn_mask=None)
        ctx.save_for_backward(*inputs, out_BSHD, lse, *state)
        ctx.set_materialize_grads(False)
        return (out_BSHD, lse) if return_lse else out_BSHD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_out, grad_lse = grad_outputs if len(grad_outputs) == 2 else (grad_outputs[0], None)
        grads: list[Tensor | None] = [None] * len(ARGUMENTS)
        if grad_out is None and grad_lse is None:
            return tuple(grads)
        q, k, v, bias, cu_q, cu_k, log_mass, sink, sink_value, out_BSHD, lse, *state = ctx.saved_tensors
        call = _with_cu_k(ctx.call._replace(q=q, k=k, v=v, bias=bias, cu_q=cu_q, cu_k=cu_k))
        grad_out = None if grad_out is None else grad_out.transpose(1, 2)
        found = Found(out_BSHD.transpose(1, 2), lse, tuple(state))
        mass, needs = Mass(log_mass, sink_HS=sink, sink_value_HD=sink_value), [ctx.needs_input_grad[i] for i in INPUTS]
        for i, grad in zip(INPUTS, gradients(ctx.engine, call, mass, found, grad_out, grad_lse, needs), strict=True):
            grads[i] = grad
        return tuple(grads)


class _Planned(torch.autograd.Function):
    """_Attend for a call that has a plan (plans.py), with what such a call needs alone: it takes a third of the time."""

    @staticmethod
    def forward(
        ctx: Any, causal: bool, scale: float, q: Tensor, k: Tensor, v: Tensor,
        log_mass: Tensor, sink: Tensor | None, sink_value: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        out, lse = cpu.attention(q, k, v, causal, scale)
        mass = Mass(log_mass, sink_HS=sink, sink_value_HD=sink_value)
        out, lse = epilogue_in_place(out, lse, mass, may_be_masked=False, return_lse=True)
        ctx.causal, ctx.scale = causal, scale
        ctx.save_for_backward(q, k, v, log_mass, sink, sink_value, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_out, grad_lse = grad_outputs
        if grad_out is None and grad_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        q, k, v, log_mass, sink, sink_value, out, lse = ctx.saved_tensors
        mass = Mass(log_mass, sink_HS=sink, sink_value_HD=sink_value)
        needs = [*ctx.needs_input_grad[2:5], False, *ctx.needs_input_grad[5:]]
        call = Call(q, k, v, None, None, None, ctx.causal, ctx.scale)
        dq, dk, dv, _, *of_mass = gradients("cpu", call, mass, Found(out, lse, ()), grad_out, grad_lse, needs)
        return None, None, dq, dk, dv, *of_mass


class Found(NamedTuple):
    """What the forward pass found: StableMask's own out' and lse', and what the engine wants kept."""

    out: Tensor
    lse: Tensor
    state: State


def gradients(
    engine: str, call: Call, mass: Mass, found: Found, grad_out: Tensor | None, grad_lse: Tensor | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Of q, k, v, bias, log M, a sink and its value, in this order, which is that of needs too. One of the two grads is given."""
    out, lse, state = found
    grads: list[Tensor | None] = [None] * len(INPUTS)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    *_, needs_bias, needs_mass, needs_sink, needs_value = needs
    if needs_mass:
        assert mass.log_mass_HS is not None
        grads[4] = log_mass_grad(grad_out, out, lse, mass.log_mass_HS, grad_lse)
    if needs_sink or needs_value:
        assert mass.sink_HS is not None
        assert mass.sink_value_HD is not None
        grads[5], grads[6] = sink_value_grads(grad_out, lse, mass.sink_HS, mass.sink_value_HD)
    if call.bias is not None or call.may_be_masked:
        # A fully masked row without mass has lse' = -inf: exp(score - lse') must be 0 there, not NaN.
        lse = lse.masked_fill(torch.isneginf(lse), torch.inf)
    q, v = call.q, call.v
    if grad_lse is not None:
        call, grad_out, out = widened(call, grad_out, out, grad_lse)
    dq, dk, dv, grads[3] = KERNELS[engine].backward(call, grad_out, out, lse, state, needs_bias)
    if grad_lse is not None:
        dq, dk, dv = dq[..., : q.shape[-1]], dk[..., : q.shape[-1]], dv[..., : v.shape[-1]]
    grads[:3] = dq, dk, dv
    return grads


def _with_cu_k(call: Call) -> Call:
    """attend() leaves cu_k out where it is cu_q."""
    return call if call.cu_q is None or call.cu_k is not None else call._replace(cu_k=call.cu_q)


def widened(call: Call, grad_out: Tensor, out: Tensor, grad_lse: Tensor) -> tuple[Call, Tensor, Tensor]:
    """The call, grad_out and out with columns that put delta - grad_lse' in the place of delta."""
    # A power of two per row keeps large and small gradients within the range of fp16.
    exponent = torch.frexp(grad_lse.detach()).exponent.clamp(-14, 15)
    factor = torch.ldexp(torch.ones_like(grad_lse), exponent).to(out.dtype)
    rest, columns = -grad_lse / factor.to(grad_lse.dtype), []
    for _ in range(PARTS):
        columns.append(rest.to(out.dtype))
        rest = rest - columns[-1].to(rest.dtype)
    extra = pad(torch.stack(columns, dim=-1), (0, WIDENING - PARTS))
    q, k, v = [pad(x, (0, WIDENING)) for x in (call.q, call.k, call.v)]
    factors = factor.unsqueeze(-1).expand_as(extra)
    return (call._replace(q=q, k=k, v=v), _with_columns(grad_out.to(out.dtype), factors), _with_columns(out, extra))


def _with_columns(x_BHSD: Tensor, columns_BHSW: Tensor) -> Tensor:
    """Both side by side, (B, H, S, D + W) over (B, S, H, D + W) memory, as the kernels' own outputs are."""
    return torch.cat([x_BHSD.transpose(1, 2), columns_BHSW.transpose(1, 2)], dim=-1).transpose(1, 2)
