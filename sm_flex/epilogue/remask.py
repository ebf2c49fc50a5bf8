"""The remask epilogue: from ordinary causal attention's (out, lse) and log M to StableMask's (out', lse').

    s = sigmoid(lse - log M),   out' = s * out,   lse' = logaddexp(lse, log M)

Plain PyTorch here; kernel.py is the same in one Triton launch, for a GPU.

Shapes in names: B batch, H query heads, S queries, D head dim of the values.
"""

import torch
from torch import Tensor

from sm_flex.checks.tensors import broadcasts
from sm_flex.epilogue.formula import exp_difference, pseudo_share, real_share_and_lse, times_share
from sm_flex.mass.table import Mass
from sm_flex.runtime import HAS_TRITON, check_no_transform, device_type, watched

# Imported here and not where it is called, which may be traced.
if HAS_TRITON:
    from sm_flex.epilogue import kernel
else:
    kernel = None


def remask(out: Tensor, lse: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor]:
    """StableMask's epilogue alone, for a caller with an attention kernel of their own.

    s = sigmoid(lse - log_mass), out' = s * out, lse' = logaddexp(lse, log_mass). With (out, lse) of ordinary
    causal attention this is eq. 11. For ring attention merge the shards first, then remask once.
    Differentiable in all three. A kernel whose backward ignores the gradient of lse needs the drop-ins
    instead, whose backward does not use it.

    Args:
        out: (..., S, D) floating, attention output. Not written to.
        lse: (..., S) float32 or float64, natural log-sum-exp of the real scores; -inf for a row without
            visible keys, of which out is not used.
        log_mass: broadcastable to lse, from :func:`sm_flex.log_mass`.

    Returns:
        out' like out, lse' like lse. A fully masked row (lse = -inf) has share 0, and out' = 0.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, shape or device.
        NotImplementedError: under a torch.func transform.

    Example:
        >>> out, lse = torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2)
        >>> remask(out, lse, torch.zeros(1, 2))[0][0, 0, 0]
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    for name, x in (("out", out), ("lse", lse), ("log_mass", log_mass)):
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
    check_no_transform()
    return _Remask.apply(out, lse, log_mass.to(lse.dtype))


class _Remask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out: Tensor, lse: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor]:
        new_out, new_lse = epilogue(out, lse, Mass(log_mass), in_place=False)
        assert new_lse is not None
        ctx.save_for_backward(out, lse, log_mass, new_lse)
        return new_out, new_lse

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad_out, grad_lse = grad_outputs
        out, lse, log_mass, new_lse = ctx.saved_tensors
        pseudo = pseudo_share(new_lse, log_mass)
        real = exp_difference(lse, new_lse)
        grad_s = (grad_out.to(new_lse.dtype) * out.to(new_lse.dtype)).sum(-1)
        grad_s = grad_s.masked_fill(torch.isneginf(lse), 0.0)  # a fully masked row's out may hold NaN
        slope = grad_s * real * pseudo
        return (
            grad_out * real.unsqueeze(-1).to(grad_out.dtype),
            slope + grad_lse * real,
            (grad_lse * pseudo - slope).sum_to_size(log_mass.shape),
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
    log_mass = mass.table(out.shape[-2], lse.dtype)
    share, new_lse = real_share_and_lse(lse, log_mass, may_be_masked=may_be_masked, return_lse=return_lse)
    # Every row is written. The GPU kernel skips rows that s leaves unchanged; on a CPU finding them takes
    # longer (to S = 4k).
    if not in_place or compiling:
        return times_share(out, share, lse, may_be_masked=may_be_masked), new_lse
    out.mul_((share if share.dtype == out.dtype else share.to(out.dtype)).unsqueeze(-1))
    if may_be_masked:
        out.masked_fill_(torch.isneginf(lse).unsqueeze(-1), 0.0)
    return out, new_lse


def log_mass_grad(grad_out: Tensor, out: Tensor, lse: Tensor, log_mass: Tensor, grad_lse: Tensor | None) -> Tensor:
    """d loss / d log M = (1 - s) * (grad_lse - rowsum(grad_out * out)), from StableMask's own out' and lse'."""
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    inner = -delta if grad_lse is None else grad_lse - delta
    return (inner * pseudo_share(lse, log_mass)).sum_to_size(log_mass.shape)
