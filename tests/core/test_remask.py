"""The epilogue alone, in plain PyTorch: formula, gradients, edges."""

import math

import pytest
import torch
from torch import Tensor

from sm_flex import log_mass, remask
from sm_flex.epilogue.remask import epilogue, log_mass_grad
from sm_flex.mass.table import Mass
from sm_flex.testing import oracle

INF = math.inf


def test_is_equation_11_over_causal_attention():
    q, k, v = (torch.randn(2, 3, 11, 5, dtype=torch.float64) for _ in range(3))
    gamma = torch.tensor([0.5, 0.1, 0.0], dtype=torch.float64)
    causal, lse = oracle(q, k, v, gamma=INF)
    out, new_lse = remask(causal, lse, log_mass(gamma, torch.arange(11), 20))
    expected, expected_lse = oracle(q, k, v, gamma=gamma, length=20)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(new_lse, expected_lse)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (1, 5), (2, 3, 5), (2, 1, 5)])
def test_gradients_in_all_three(shape: tuple[int, ...]):
    out = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    lse = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    mass = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(remask, (out, lse, mass))
    assert torch.autograd.gradgradcheck(remask, (out, lse, mass))


@pytest.mark.parametrize("reaches_lse", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (1, 5), (3, 1)])
def test_the_gradient_of_the_mass_from_what_the_epilogue_returns(shape: tuple[int, ...], reaches_lse: bool):
    """log_mass_grad sees (out', lse') alone, as a backward that kept nothing else does; remask's own backward sees (out, lse)."""
    out, lse = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    mass = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    new_out, new_lse = remask(out, lse, mass)
    grad_out, grad_lse = torch.randn_like(new_out), torch.randn_like(new_lse) if reaches_lse else None
    loss = (new_out * grad_out).sum() + (0.0 if grad_lse is None else (new_lse * grad_lse).sum())
    (expected,) = torch.autograd.grad(loss, mass)
    torch.testing.assert_close(log_mass_grad(grad_out, new_out, new_lse, mass, grad_lse), expected)


def test_gradients_where_shares_are_0_or_1():
    """lse or log M of -inf: outputs exact, gradients finite, 0 where nothing can change."""
    lse = torch.tensor([0.0, -INF, 0.0, -INF, 800.0, -800.0], dtype=torch.float64, requires_grad=True)
    mass = torch.tensor([-INF, 0.0, 0.0, -INF, -800.0, 800.0], dtype=torch.float64, requires_grad=True)
    out = torch.ones(6, 2, dtype=torch.float64, requires_grad=True)
    new_out, new_lse = remask(out, lse, mass)
    assert new_out[:, 0].tolist() == [1.0, 0.0, 0.5, 0.0, 1.0, 0.0]
    assert new_lse.tolist() == [0.0, 0.0, pytest.approx(math.log(2)), -INF, 800.0, 800.0]
    (new_out.sum() + new_lse.masked_fill(torch.isinf(new_lse), 0.0).sum()).backward()
    for grad in (out.grad, lse.grad, mass.grad):
        assert grad is not None
        assert torch.isfinite(grad).all()
    assert lse.grad is not None
    assert lse.grad[2] == pytest.approx(0.5 + 2 * 0.25)


@pytest.mark.parametrize("in_place", [False, True])
def test_nan_in_a_fully_masked_row_goes_no_further(in_place: bool):
    """Kernels leave what they like in such a row: 0 comes out of it, and gradients of 0."""
    out, lse = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5)
    lse[0, 1, 2], out[0, 1, 2] = -INF, math.nan
    mass = torch.randn(3, 5, requires_grad=True)
    new_out, new_lse = epilogue(out.clone(), lse, Mass(mass.detach()), in_place=in_place)
    assert new_lse is not None
    assert torch.isfinite(new_out).all()
    assert not new_out[0, 1, 2].any()
    out.requires_grad_()
    lse.requires_grad_()
    torch.testing.assert_close(remask(out, lse, mass), (new_out, new_lse))
    for grad in torch.autograd.grad(remask(out, lse, mass)[0].sum(), (out, lse, mass)):
        assert torch.isfinite(grad).all()
        assert grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype):
    out, lse = torch.randn(2, 3, 5, 4).to(dtype), torch.randn(2, 3, 5)
    new_out, new_lse = remask(out, lse, torch.zeros(1, 5))
    assert new_out.dtype == dtype
    assert new_lse.dtype == torch.float32
    torch.testing.assert_close(new_out.double(), out.double() * torch.sigmoid(lse.double()).unsqueeze(-1), rtol=2e-2, atol=1e-6)


def test_inputs_are_left_alone():
    out, lse, mass = torch.randn(2, 5, 4), torch.randn(2, 5), torch.randn(1, 5)
    kept = [x.clone() for x in (out, lse, mass)]
    remask(out, lse, mass)
    for a, b in zip((out, lse, mass), kept, strict=True):
        assert torch.equal(a, b)


def test_shards_of_a_ring_merge_first():
    """Two halves of the keys attended apart, merged by their lse, remasked once."""
    q, k, v = (torch.randn(1, 2, 8, 4, dtype=torch.float64) for _ in range(3))
    mass = log_mass(torch.tensor(0.2).double(), torch.arange(8), 16)

    def shard(keys: slice) -> tuple[Tensor, Tensor]:
        visible = torch.zeros(8, 8, dtype=torch.bool)
        visible[:, keys] = True
        return oracle(q, k, v, gamma=INF, visible=visible)

    (a, la), (b, lb) = shard(slice(0, 3)), shard(slice(3, 8))
    lse = torch.logaddexp(la, lb)
    merged = a * (la - lse).exp().unsqueeze(-1) + b * (lb - lse).exp().unsqueeze(-1)
    out, _ = remask(merged, lse, mass)
    torch.testing.assert_close(out, oracle(q, k, v, gamma=0.2, length=16)[0], rtol=0, atol=1e-7)


def test_under_compile(fresh_compiler: None):
    args = (torch.randn(2, 3, 5, 4, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True), torch.randn(3, 5))
    expected = remask(*args)
    actual = torch.compile(remask, fullgraph=True)(*args)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(out.sum() + lse.sum(), args[:2]) for out, lse in (actual, expected)]
    torch.testing.assert_close(*grads)
