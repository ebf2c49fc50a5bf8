"""Faults to plant in the engines: what the model, and the spy on fake tensors, must notice."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from sm_flex.engines import Call, cudnn, efficient, flash

Plant = Callable[[pytest.MonkeyPatch], None]
# Where the arguments of a backward op stand.
OUT, LSE = 5, 6


def _given(module: Any, op: str, change: Callable[[list[Any]], None]) -> Plant:
    """The op is given other arguments."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = getattr(module, op)

        def changed(*args: Any, **kwargs: Any) -> Any:
            arguments = list(args)
            change(arguments)
            return real(*arguments, **kwargs)

        patch.setattr(module, op, changed)

    return plant


def _set(index: int, new: Callable[[Any], Any]) -> Callable[[list[Any]], None]:
    def change(arguments: list[Any]) -> None:
        arguments[index] = new(arguments[index])

    return change


def _swap(i: int, j: int) -> Callable[[list[Any]], None]:
    def change(arguments: list[Any]) -> None:
        arguments[i], arguments[j] = arguments[j], arguments[i]

    return change


def _instead(module: Any, name: str, new: Callable[..., Any]) -> Plant:
    return lambda patch: patch.setattr(module, name, new)


def _first_of_its_heads(grad: Tensor, x: Tensor) -> Tensor:
    groups = grad.shape[1] // x.shape[1]
    return grad[:, ::groups]


def _minus_infinity(arguments: list[Any]) -> None:
    rows, lse = arguments[1].shape[2], arguments[LSE].clone()
    lse[..., :rows] = lse[..., :rows].masked_fill(lse[..., :rows] == math.inf, -math.inf)
    arguments[LSE] = lse


def _never_masked(call: Call, forward: Callable[[Call], Any] = flash.forward) -> Any:
    return forward(call._replace(may_be_masked=False))


# The memory-efficient kernel.
out_in_bhsd_memory = _given(efficient, "efficient_backward_op", _set(OUT, lambda out: out.contiguous()))
unpadded_lse = _instead(efficient, "pad", lambda x, *args, **kwargs: x)
padded_with_zeros = _instead(efficient, "pad", lambda x, columns, value=0.0, pad=efficient.pad: pad(x, columns, value=0.0))
heads_not_repeated = _instead(efficient, "_inputs", lambda call: (call.q, call.k, call.v))
dv_not_summed = _instead(efficient, "_summed", _first_of_its_heads)
heads_left_repeated = _instead(efficient, "_summed", lambda grad, x: grad)
bias_not_aligned = _instead(efficient, "_aligned_bias", lambda call: call.bias.expand(*call.q.shape[:2], -1, -1))
minus_infinity_in_the_backward = _given(efficient, "efficient_backward_op", _minus_infinity)
seed_for_offset = _given(efficient, "efficient_backward_op", _swap(7, 8))
# cuDNN.
cudnn_seed_for_offset = _given(cudnn, "cudnn_backward_op", _swap(6, 7))
cudnn_out_in_bhsd_memory = _given(cudnn, "cudnn_backward_op", _set(4, lambda out: out.contiguous()))
statistics_of_three_dimensions = _given(cudnn, "cudnn_backward_op", _set(5, lambda lse: lse.squeeze(-1)))
statistics_of_other_strides = _given(
    cudnn, "cudnn_backward_op", _set(5, lambda lse: lse.transpose(1, 2).contiguous().transpose(1, 2))
)
# FlashAttention.
plus_infinity_in_the_forward = _instead(flash, "forward", _never_masked)
state_swapped = _given(flash, "flash_backward_op", _swap(12, 13))
head_dim_not_padded = _instead(flash, "padded", lambda x: x)
