"""A model rounded to int8: its weights, what enters its products, its key-value cache.

Symmetric, the numbers of PyTorch's torchao (Int8DynamicActivationInt8WeightConfig): x is round(x / s) s with s = max |x| / 127.5.
Weights have a scale for each output channel; activations and the cache get theirs as they come (dynamic), one for the whole
tensor or one for each token (of each head, in the cache). The rounded numbers are multiplied in float32: the values of an int8
product, without its speed. The embedding and the head, which is the same matrix, stay in float32.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from sm_flex_transformers import stablemask_attention


class Rounding(NamedTuple):
    """What is rounded: by "token" or "tensor", or None."""

    weights: bool = False
    activations: str | None = None
    cache: str | None = None


ROUNDINGS = {
    "int8 weights": Rounding(weights=True),
    "and activations by token": Rounding(weights=True, activations="token"),
    "and activations by tensor": Rounding(weights=True, activations="tensor"),
    "int8 cache by token": Rounding(cache="token"),
    "int8 cache by tensor": Rounding(cache="tensor"),
}


def rounded(x: Tensor, by: str) -> Tensor:
    """To int8 and back: one scale for the last dimension of each entry ("token"), or one for all ("tensor")."""
    largest = x.abs().amax(-1, keepdim=True) if by == "token" else x.abs().amax()
    scale = (largest / 127.5).clamp(min=torch.finfo(x.dtype).eps)
    return (x * (1 / scale)).round().clamp(-128, 127) * scale


@contextmanager
def quantised(model: Any, rounding: Rounding) -> Iterator[None]:
    """Within: the linear layers of the decoder and its cache are rounded. Afterwards the model is as it was."""
    linears = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    before = [linear.weight.data for linear in linears] if rounding.weights else []
    with ExitStack() as stack:
        if rounding.weights:
            for linear in linears:
                linear.weight.data = rounded(linear.weight.data, "token")
            stack.callback(_restore, linears, before)
        if (by := rounding.activations) is not None:
            for linear in linears:
                stack.enter_context(_hooked(linear, by))
        if (by := rounding.cache) is not None:
            stack.enter_context(_rounded_cache(by))
        yield


def _restore(linears: list[nn.Linear], weights: list[Tensor]) -> None:
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight.data = weight


@contextmanager
def _hooked(linear: nn.Linear, by: str) -> Iterator[None]:
    handle = linear.register_forward_pre_hook(lambda module, given: (rounded(given[0], by),))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _rounded_cache(by: str) -> Iterator[None]:
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any) -> Any:
        return stablemask_attention(module, query, rounded(key, by), rounded(value, by), mask, **given)

    AttentionInterface.register("stablemask", attention)
    try:
        yield
    finally:
        AttentionInterface.register("stablemask", stablemask_attention)
