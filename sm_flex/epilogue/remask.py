"""The remask epilogue: from ordinary causal attention's (out, lse) and log M to StableMask's (out', lse').

    s = sigmoid(lse - log M),   out' = s * out,   lse' = logaddexp(lse, log M)

Where a sink carries a value v, log M is the whole mass, and out' gains exp(sink - lse') * v.

Plain PyTorch here; kernel.py is the same in one Triton launch, for a GPU.

Shapes in names: B batch, H query heads, S queries, D head dim of the values.
"""

from typing import Any

import torch
from torch import Tensor

from sm_flex.checks.tensors import broadcasts
from sm_flex.epilogue.formula import (
    exp_difference,
    pseudo_share,
    real_share_and_lse,
    times_share,
    times_share_plus_value,
)
from sm_flex.mass.closed_form import log_add
from sm_flex.mass.table import Mass
from sm_flex.runtime import HAS_TRITON, check_no_transform, device_type, watched

# Imported here and not where it is called, which may be traced.
if HAS_TRITON:
    from sm_flex.epilogue import kernel
else:
    kernel = None


def remask(
    out: Tensor, lse: Tensor, log_mass: Tensor, *, sink: Tensor | None = None, sink_value: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """StableMask's epilogue alone, for a caller with an attention kernel of their own.

    s = sigmoid(lse - log_mass), out' = s * out, lse' = logaddexp(lse, log_mass). With (out, lse) of ordinary
    causal attention this is eq. 11. For ring attention merge the shards first, then remask once.
    Differentiable in all five. A kernel whose backward ignores the gradient of lse needs the drop-ins
    instead, whose backward does not use it.

    With a sink log M is log(e^log_mass + e^sink) in both, and where the sink carries a value out' gains
    exp(sink - lse') * sink_value.

    Args:
        out: (..., S, D) floating, attention output. Not written to.
        lse: (..., S) float32 or float64, natural log-sum-exp of the real scores; -inf for a row without
            visible keys, of which out is not used.
        log_mass: broadcastable to lse, from :func:`sm_flex.log_mass`: the mass of gamma alone, -inf for none.
        sink: one more pseudo score per row: (H,) with one per head, or broadcastable to lse; -inf is none.
        sink_value: what that score carries, (H, D) or (1, D). Needs a sink.

    Returns:
        out' like out, lse' like lse. A fully masked row (lse = -inf) has share 0, and out' = 0, or what the
        sink adds to it.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, shape or device.
        NotImplementedError: under a torch.func transform.

    Example:
        >>> out, lse = torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2)
        >>> remask(out, lse, torch.zeros(1, 2))[0][0, 0, 0]
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    given = [("out", out), ("lse", lse), ("log_mass", log_mass)]
    if sink is not None:
        given.append(("sink", sink))
    if sink_value is not None:
        given.append(("sink_value", sink_value))
        if sink is None:
            raise ValueError("sink is required where sink_value is given: pass remask(..., sink=...), its pseudo score")
    for name, x in given:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got dtype {x.dtype}")
        if x.device != out.device:
            raise ValueError(f"{name} must be on the device of out, {out.device}, got {x.device}")
    for name, x in (("lse", lse), ("log_mass", log_mass)):
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64 (less would move the share), got {x.dtype}")
    if out.dim() < 2 or lse.shape != out.shape[:-1]:
        raise ValueError(
            f"lse must have the shape of out without its last dimension, {tuple(out.shape[:-1])}, got {tuple(lse.shape)}"
        )
    if not broadcasts(log_mass.shape, lse.shape):
        raise ValueError(f"log_mass must be broadcastable to lse, {tuple(lse.shape)}, got {tuple(log_mass.shape)}")
    if sink is not None:
        _check_sink(sink, sink_value, out, lse)
    whole = log_mass.to(lse.dtype)
    if sink is None:
        return remask_by_mass(out, lse, Mass(whole))
    sink = sink.to(lse.dtype)
    sink = sink.unsqueeze(-1) if sink.dim() == 1 and lse.dim() > 1 else sink
    whole = log_add(whole, sink)
    if sink_value is None:
        return remask_by_mass(out, lse, Mass(whole))
    value = sink_value.to(lse.dtype)
    value = value.expand(out.shape[-3], -1) if out.dim() > 2 else value[0]
    return remask_by_mass(out, lse, Mass(whole, sink_HS=sink, sink_value_HD=value))


def _check_sink(sink: Tensor, sink_value: Tensor | None, out: Tensor, lse: Tensor) -> None:
    heads = out.shape[-3] if out.dim() > 2 else 1
    if sink.dim() == 1 and sink.shape[0] not in (1, heads):
        raise ValueError(f"sink must have one value for each of the {heads} heads of lse, got {sink.shape[0]}")
    if sink.dim() > 1 and not broadcasts(sink.shape, lse.shape):
        raise ValueError(f"sink must be (H,) or broadcastable to lse, {tuple(lse.shape)}, got {tuple(sink.shape)}")
    if sink_value is not None and sink_value.shape not in ((heads, out.shape[-1]), (1, out.shape[-1])):
        raise ValueError(f"sink_value must be (H, D) = {(heads, out.shape[-1])}, got {tuple(sink_value.shape)}")


def remask_by_mass(out: Tensor, lse: Tensor, mass: Mass) -> tuple[Tensor, Tensor]:
    """remask() by a Mass that is a table, for the engines that differentiate through their log-sum-exp."""
    check_no_transform()
    return _Remask.apply(out, lse, mass.log_mass_HS, mass.sink_HS, mass.sink_value_HD)


class _Remask(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor, lse: Tensor, log_mass: Tensor, sink: Tensor | None, sink_value: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        mass = Mass(log_mass, sink_HS=sink, sink_value_HD=sink_value)
        new_out, new_lse = epilogue(out, lse, mass, in_place=False)
        assert new_lse is not None
        ctx.save_for_backward(out, lse, log_mass, new_lse, sink, sink_value)
        return new_out, new_lse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse = grad_outputs
        out, lse, log_mass, new_lse, sink, sink_value = ctx.saved_tensors
        pseudo = pseudo_share(new_lse, log_mass)
        real = exp_difference(lse, new_lse)
        grad_s = (grad_out.to(new_lse.dtype) * out.to(new_lse.dtype)).sum(-1)
        grad_s = grad_s.masked_fill(torch.isneginf(lse), 0.0)  # a fully masked row's out may hold NaN
        slope = grad_s * real * pseudo
        grad_total, grads_of_value = grad_lse, (None, None)
        if sink_value is not None:
            # p_sink = exp(sink - lse') falls as lse' rises, whichever of its terms made it rise.
            grad_p = (grad_out.to(new_lse.dtype) * sink_value.unsqueeze(-2)).sum(-1)
            grad_total = grad_lse - grad_p * exp_difference(sink, new_lse)
            if any(ctx.needs_input_grad[3:]):
                grads_of_value = sink_value_grads(grad_out, new_lse, sink, sink_value)
        return (
            grad_out * real.unsqueeze(-1).to(grad_out.dtype),
            slope + grad_total * real,
            (grad_total * pseudo - slope).sum_to_size(log_mass.shape),
            *grads_of_value,
        )


def epilogue(
    out: Tensor, lse: Tensor, mass: Mass, *, in_place: bool, may_be_masked: bool = True, return_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """(out', lse') without autograd; out (..., S, D), lse (..., S).

    in_place: out may be written to. It is not under a dispatch mode, which may have kept out for itself, as
    an eager selective checkpoint does. lse' is always a new tensor.
    may_be_masked: some row may be fully masked (lse = -inf).
    return_lse: lse' is needed. The GPU kernel returns it in any case, since there it costs nothing.
    """
    compiling = torch.compiler.is_compiling()
    in_place = in_place and (compiling or not watched())
    if (
        kernel is not None
        and device_type(out.device) == "cuda"
        and out.numel()
        and out.dtype != torch.float64
        and lse.dtype == torch.float32
    ):
        return kernel.launch(out, lse, mass, in_place=in_place)
    mass = mass.tabled(out.shape[-2], lse.dtype)
    if in_place and not compiling:
        return epilogue_in_place(out, lse, mass, may_be_masked=may_be_masked, return_lse=return_lse)
    if compiling and not torch.compiler.is_exporting() and out.device.type == "cpu":
        return torch.ops.sm_flex.epilogue_cpu(out, lse, mass.log_mass_HS, mass.sink_HS, mass.sink_value_HD, may_be_masked)
    share, new_lse, value = _shares(lse, mass, may_be_masked=may_be_masked, return_lse=return_lse)
    if value is None:
        return times_share(out, share, lse, may_be_masked=may_be_masked), new_lse
    return times_share_plus_value(out, share, lse, *value, may_be_masked=may_be_masked), new_lse


def epilogue_in_place(
    out: Tensor, lse: Tensor, mass: Mass, *, may_be_masked: bool, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """epilogue() by a Mass that is a table, with out' written over out where no value has to be added in a wider dtype.

    Every row is written. The GPU kernel skips rows that s leaves unchanged; on a CPU finding them takes longer (to
    S = 4k).
    """
    share, new_lse, value = _shares(lse, mass, may_be_masked=may_be_masked, return_lse=return_lse)
    if value is not None and out.dtype != share.dtype:
        return times_share_plus_value(out, share, lse, *value, may_be_masked=may_be_masked), new_lse
    out.mul_((share if share.dtype == out.dtype else share.to(out.dtype)).unsqueeze(-1))
    if may_be_masked:
        out.masked_fill_(torch.isneginf(lse).unsqueeze(-1), 0.0)
    if value is not None:
        out.addcmul_(value[0].unsqueeze(-1), value[1].unsqueeze(-2))
    return out, new_lse


@torch.library.custom_op(
    "sm_flex::epilogue_cpu",
    mutates_args={},
    device_types="cpu",
    schema="(Tensor out, Tensor lse, Tensor log_mass, Tensor? sink, Tensor? sink_value, bool may_be_masked) -> (Tensor, Tensor)",
)
def _epilogue_op(
    out: Tensor, lse: Tensor, log_mass: Tensor, sink: Tensor | None, sink_value: Tensor | None, may_be_masked: bool
) -> tuple[Tensor, Tensor]:
    """epilogue() in compiled code, for which Inductor would build C++: a program's first kernel takes it some ten seconds."""
    mass = Mass(log_mass, sink_HS=sink, sink_value_HD=sink_value)
    share, new_lse, value = _shares(lse, mass, may_be_masked=may_be_masked, return_lse=True)
    assert new_lse is not None
    if value is None:
        new_out = torch.mul(out, share.unsqueeze(-1).to(out.dtype), out=torch.empty_like(out))
        if may_be_masked:
            new_out.masked_fill_(torch.isneginf(lse).unsqueeze(-1), 0.0)
    else:
        new_out = times_share_plus_value(out, share, lse, *value, may_be_masked=may_be_masked)
    # Compiled code counts on the layouts of the fake tensors.
    return _laid_out_as(new_out, out), _laid_out_as(new_lse, lse)


@_epilogue_op.register_fake
def _(out: Tensor, lse: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out), torch.empty_like(lse)


def _laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    empty = torch.empty_like(like)
    return x if x.stride() == empty.stride() else empty.copy_(x)


def _shares(
    lse: Tensor, mass: Mass, *, may_be_masked: bool, return_lse: bool
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """s, lse' where it is needed, and where the sink carries a value p_sink and that value."""
    log_mass, sink, value = mass.log_mass_HS, mass.sink_HS, mass.sink_value_HD
    assert log_mass is not None, "a Mass that is a table"
    if sink is None or value is None:
        return *real_share_and_lse(lse, log_mass, may_be_masked=may_be_masked, return_lse=return_lse), None
    share, new_lse = real_share_and_lse(lse, log_mass, may_be_masked=may_be_masked)
    assert new_lse is not None
    return share, new_lse, (exp_difference(sink, new_lse), value)


def log_mass_grad(grad_out: Tensor, out: Tensor, lse: Tensor, log_mass: Tensor, grad_lse: Tensor | None) -> Tensor:
    """d loss / d log M = (1 - s) * (grad_lse - rowsum(grad_out * out)), from StableMask's own out' and lse'."""
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    inner = -delta if grad_lse is None else grad_lse - delta
    return (inner * pseudo_share(lse, log_mass)).sum_to_size(log_mass.shape)


def sink_value_grads(grad_out: Tensor, lse: Tensor, sink: Tensor, sink_value: Tensor) -> tuple[Tensor, Tensor]:
    """What a sink and its value get from p_sink * v in out': p_sink * (grad_out . v) and p_sink * grad_out, summed over rows.

    lse is StableMask's own lse'. What the sink gets as a part of log M is not in it (log_mass_grad).
    """
    grad_out, share = grad_out.to(lse.dtype), exp_difference(sink, lse)
    grad_sink = ((grad_out * sink_value.unsqueeze(-2)).sum(-1) * share).sum_to_size(sink.shape)
    return grad_sink, (grad_out * share.unsqueeze(-1)).sum(-2).sum_to_size(sink_value.shape)
