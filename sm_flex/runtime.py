"""What torch is doing at the moment: compiling, tracing, transforming, casting."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode


def readable(x: Tensor) -> bool:
    """Whether the values of x can be looked at without a graph break or a host synchronisation."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return type(x) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore


def plain_eager() -> bool:
    """Whether a call is nothing but itself: not compiled, not traced, without forward-mode tangents or a dispatch mode."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or forward_ad._current_level >= 0
        or _get_current_dispatch_mode() is not None
    )


def differentiable(*inputs: Tensor | None) -> bool:
    """Whether autograd records what is done with the inputs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def broadcasts(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Whether a tensor of the shape is broadcastable to the full one."""
    return len(shape) <= len(full) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(full), strict=False))


def check_no_transform() -> None:
    """torch.func cannot see through the autograd Functions here."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "torch.func (vmap, grad, vjp, jvp, ...) does not reach into StableMask attention: use torch.autograd, "
            "and the batch dimension in the place of vmap"
        )


def score_scale(scale: float | None, dim: int) -> float:
    """The scale of the scores; a head dim of 0 has none."""
    if scale is not None:
        return float(scale)
    return 1 / math.sqrt(dim) if dim else 1.0


def wide(x: Tensor) -> torch.dtype:
    """What scores, log M and lse are held in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _autocasts(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda", "mps", "xpu") and torch.is_autocast_enabled(device.type)


def autocast(query: Any, *others: Any) -> list[Any]:
    """What autocast does to the inputs of scaled_dot_product_attention: floating tensors but float64 take its dtype."""
    if not isinstance(query, Tensor) or not _autocasts(query.device):
        return [query, *others]  # the others are on the device of query, or will be refused
    dtype = torch.get_autocast_dtype(query.device.type)

    def casts(x: Any) -> bool:
        return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64

    return [x.to(dtype) if casts(x) else x for x in (query, *others)]


def no_autocast(device: torch.device) -> AbstractContextManager:
    """The engines choose their own precision: nothing inside them may be cast."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device) else nullcontext()
