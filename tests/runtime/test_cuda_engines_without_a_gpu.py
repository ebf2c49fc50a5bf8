"""What can be known of the CUDA engines on a machine without a GPU: that their calls fit torch's ops, and what they launch."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sm_flex import score_mod
from sm_flex.engines import Call, Forward, autograd, varlen_cpu
from sm_flex.epilogue import remask as epilogue_module
from sm_flex.mass.table import Mass
from sm_flex.runtime import HAS_TRITON
from sm_flex.score_mod import stablemask
from sm_flex.visibility.bias import fully_masked_rows

CUDA = "cuda"
fake_cuda = pytest.mark.skipif(
    torch.version.cuda is None, reason="a CPU build of torch knows no CUDA device, not even a fake one"
)


def fake(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device=CUDA, dtype=dtype)


@fake_cuda
@pytest.mark.parametrize(
    ("engine", "with_bias", "dim"),
    [
        ("flash", False, 64),
        ("flash", False, 60),
        ("cudnn", False, 64),
        ("cudnn", True, 64),
        ("efficient", False, 64),
        ("efficient", True, 64),
    ],
)
def test_calls_fit_the_ops(engine: str, with_bias: bool, dim: int):
    """Forward, and backward with and without the columns of a gradient of lse, against the ops' own shape functions."""
    with FakeTensorMode(), torch.no_grad():
        q, k, v = fake(2, 6, 37, dim), fake(2, 3, 37, dim), fake(2, 3, 37, dim)
        bias = fake(1, 6, 37, 37) if with_bias else None
        call = Call(q, k, v, bias, None, None, not with_bias, 0.1, may_be_masked=True)
        module = autograd.KERNELS[engine]
        out, lse, state = module.forward(call)
        assert out.shape == q.shape
        assert lse.shape == q.shape[:3]
        assert lse.dtype == torch.float32
        want_bias = with_bias and engine == "efficient"
        grads = module.backward(call, torch.empty_like(out), out, lse, state, want_bias)
        for grad, x in zip(grads, (q, k, v, bias if want_bias else None), strict=True):
            assert (grad is None) == (x is None)
            assert grad is None or x is None or grad.shape == x.shape
        wide, grad_out, wide_out = autograd.widened(call, torch.empty_like(out), out, torch.empty_like(lse))
        for grad, x in zip(module.backward(wide, grad_out, wide_out, lse, state, False)[:3], (q, k, v), strict=True):
            assert grad.shape == (*x.shape[:-1], dim + autograd.WIDENING)


@fake_cuda
@pytest.mark.parametrize("dim", [64, 60])
def test_varlen_calls_fit_the_op(dim: int):
    with FakeTensorMode(), torch.no_grad():
        q, k, v = fake(37, 6, dim), fake(41, 3, dim), fake(41, 3, dim)
        cu_q, cu_k = (torch.empty(4, device=CUDA, dtype=torch.int32) for _ in range(2))
        call = Call(q, k, v, None, cu_q, cu_k, True, 0.1, 0.0, True, 5, 20, 30)
        module = autograd.KERNELS["varlen"]
        out, lse, state = module.forward(call)
        assert out.shape == (1, 6, 37, dim)
        assert lse.shape == (1, 6, 37)
        grads = module.backward(call, torch.empty_like(out), out, lse, state, False)
        for grad, x in zip(grads[:3], (q, k, v), strict=True):
            assert grad.shape == x.shape


@fake_cuda
@pytest.mark.parametrize("engine", ["flash", "cudnn", "efficient"])
def test_flops_are_counted_as_torchs_own(engine: str):
    """The aten op is what FlopCounterMode sees, forward and backward: the sum is that of the plain op with the same sizes."""
    backward_over_forward = 2.5
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (fake(2, 4, 64, 32) for _ in range(3))
        call = Call(q, k, v, None, None, None, True, 0.1)
        module = autograd.KERNELS[engine]
        with FlopCounterMode(display=False) as forward:
            out, lse, state = module.forward(call)
        with FlopCounterMode(display=False) as backward:
            module.backward(call, torch.empty_like(out), out, lse, state, False)
    assert forward.get_total_flops() == 2 * 2 * 2 * 4 * 64 * 64 * 32
    assert backward.get_total_flops() == backward_over_forward * forward.get_total_flops()


ATTENTION = {
    "flash": torch.ops.aten._scaled_dot_product_flash_attention.default,
    "cudnn": torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    "efficient": torch.ops.aten._scaled_dot_product_efficient_attention.default,
}


class Operations(TorchDispatchMode):
    """Notes every operation, with the shape of its (first) result."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[tuple[Any, torch.Size]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, (tuple, list)) else result
        if isinstance(first, Tensor):
            self.outputs.append((func, first.shape))
        return result


@fake_cuda
@pytest.mark.skipif(not HAS_TRITON, reason="without Triton the epilogue is plain PyTorch")
@pytest.mark.parametrize(("engine", "rows"), [("efficient", 37), ("cudnn", 37), ("efficient", 5), ("flash", 41)])
def test_the_epilogue_writes_into_the_engines_own_out(engine: str, rows: int, monkeypatch: pytest.MonkeyPatch):
    """Also where rows may be fully masked: the kernel stores their 0, and nothing passes over out before it."""
    given: list[Tensor] = []

    def launch(out: Tensor, lse: Tensor, mass: Mass, *, in_place: bool) -> tuple[Tensor, Tensor]:
        given.append(out)
        return out, lse

    monkeypatch.setattr(epilogue_module.kernel, "launch", launch)
    with FakeTensorMode(), torch.no_grad():
        q, k, v = fake(2, 6, rows, 64), fake(2, 6, 37, 64), fake(2, 6, 37, 64)
        bias = None if engine == "flash" else fake(1, 1, rows, 37)
        call = Call(q, k, v, bias, None, None, bias is None, 0.1, may_be_masked=bias is None)
        with Operations() as operations:
            autograd.forward(engine, call, Mass(torch.empty(1, rows, device=CUDA)))
    (out,) = given
    assert out.shape == q.shape
    assert [func for func, shape in operations.outputs if shape == out.shape] == [ATTENTION[engine]]


def test_rows_after_the_last_document_add_nothing_to_the_gradient_of_gamma(monkeypatch: pytest.MonkeyPatch):
    """FlashAttention leaves their out and lse as it found them: NaN, as likely as not."""

    def poisoned(call: Call) -> Forward:
        out, lse, state = varlen_cpu.forward(call)
        assert call.cu_q is not None
        beyond = slice(int(call.cu_q[-1]), None)
        out[:, :, beyond], lse[:, :, beyond] = math.nan, math.nan
        return out, lse, state

    stand_in = SimpleNamespace(forward=poisoned, backward=varlen_cpu.backward)
    monkeypatch.setitem(autograd.KERNELS, "varlen", cast("Any", stand_in))
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    q, k, v = (torch.randn(9, 4, 8, dtype=torch.float64) for _ in range(3))
    q.requires_grad_()
    gamma = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def gradients(engine: str, rows: int) -> tuple[Tensor, ...]:
        call = Call(q[:rows], k[:rows], v[:rows], None, cu, cu, True, 0.3, max_q=4, max_k=4)
        mass = stablemask(gamma, length=9).mass(q.device, rows, rows, torch.float64, cu)
        out, lse = autograd.attend(engine, call, mass, return_lse=True)
        assert lse is not None
        return torch.autograd.grad(out[:, :, :7].cos().sum() + lse[:, :, :7].sum(), (q, gamma))

    torch.testing.assert_close(gradients("varlen", 9), gradients("varlen_cpu", 7))


@fake_cuda
def test_fully_masked_rows_take_a_launch_or_two():
    """Whatever the length: each block of rows would be half a dozen of them."""
    with FakeTensorMode(), Operations() as operations:
        masked = fully_masked_rows(fake(2, 1, 8192, 8192), causal=False)
    assert masked.shape == (2, 1, 8192)
    assert len(operations.outputs) <= 3


@fake_cuda
def test_a_number_reaches_the_device_by_a_fill():
    """A copy from the host would wait for the device in every call whose StableMask is made in forward()."""
    device = torch.device(CUDA)
    masks = [stablemask(0.25, length=10, sink=0.5) for _ in range(2)]
    with FakeTensorMode(allow_non_fake_inputs=True), Operations() as operations:
        for mask in masks:
            assert mask.sink is not None
            assert mask._on(device, "gamma", mask.gamma).device.type == CUDA
            assert mask._on(device, "sink", mask.sink).device.type == CUDA
    names = [str(func) for func, _ in operations.outputs]
    assert sum("full" in name for name in names) == 4
    assert not [name for name in names if "_to_copy" in name]


def test_a_number_is_the_same_wherever_it_is_filled_in():
    for number in (0.1, 0.0, math.inf, 1e-300):
        gamma = score_mod._to_device(torch.tensor(number, dtype=torch.float64), torch.device("cpu"))
        assert gamma.dtype == torch.float64
        assert gamma.item() == number
    learned = torch.tensor(0.5, requires_grad=True)
    assert score_mod._to_device(learned, torch.device("cpu")).requires_grad
