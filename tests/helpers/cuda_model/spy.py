"""The contract on fake CUDA tensors: what the attention ops are given in a forward and a backward of the drop-ins."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sm_flex.engines import autograd
from sm_flex.epilogue import remask
from tests.helpers.cuda_model import choice
from tests.helpers.cuda_model.contract import CONTRACTS, need

CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention.default
CUDNN_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default


class Spy(TorchDispatchMode):
    """Holds every call of an attention op to its contract, and notes which were called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []
        self.cudnn_out = torch.empty(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CONTRACTS:
            CONTRACTS[func](*args, **(kwargs or {}))
            self.called.append(func.name().partition("::")[2])
        result = func(*args, **(kwargs or {}))
        if func is CUDNN:
            self.cudnn_out = result[0]
        if func is CUDNN_BACKWARD and args[4].shape == self.cudnn_out.shape:
            # cudnn/MHA.cpp: a graph is kept for calls of the same q, k and v, with the strides that out had (cudnn.py).
            lies = args[4].stride(), self.cudnn_out.stride()
            need(lies[0] == lies[1], f"cudnn: out lies as its forward left it, got {lies[0]} for {lies[1]}")
        return result


class Step:
    """One call's autograd Function, run by hand: autograd itself asks CUDA for a stream, which nobody has here."""

    def __init__(self, function: Any, arguments: tuple[Any, ...]) -> None:
        self.function, self.saved_tensors = function, ()
        self.inputs = [x if isinstance(x, Tensor) and x.is_floating_point() else None for x in arguments]
        self.needs_input_grad = [x is not None and x.requires_grad for x in self.inputs]
        self.outputs = function.forward(self, *arguments)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass

    def backward(self, change: Callable[[Tensor], Tensor], lse_grad: bool) -> None:
        """With a gradient of out in a layout of its own, and one of lse'. Every gradient has the shape of its input."""
        out, lse = self.outputs
        grads = self.function.backward(self, change(torch.empty_like(out)), torch.empty_like(lse) if lse_grad else None)
        for x, grad, wanted in zip(self.inputs, grads, self.needs_input_grad, strict=True):
            if wanted:
                assert x is not None
                assert grad is not None, "no gradient"
                assert grad.shape == x.shape, f"a gradient is {tuple(grad.shape)}, its input {tuple(x.shape)}"


@contextmanager
def watched_steps() -> Iterator[tuple[Spy, list[Step]]]:
    """On fake CUDA tensors: the spy, and the steps that the drop-ins took. The epilogue runs in PyTorch."""
    steps: list[Step] = []
    function = autograd._Attend

    class Recorder:
        @staticmethod
        def apply(*arguments: Any) -> Any:
            steps.append(Step(function, arguments))
            return steps[-1].outputs

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True), Spy() as spy:
        patch.setattr(autograd, "_Attend", Recorder)
        patch.setattr(remask, "kernel", None)
        choice.patch_torch(patch)
        yield spy, steps
