"""remask(..., sink=, sink_value=): the sink joins the mass, and its value out."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sm_flex import log_mass, remask
from sm_flex.epilogue.remask import epilogue, log_mass_grad, sink_value_grads
from sm_flex.mass.table import Mass
from sm_flex.testing import oracle

INF = math.inf
HEADS, KV_HEADS = 3, 1


def drawn(*shape: int, **options: Any) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, **options)


@pytest.mark.parametrize("sink_shape", [(), (3,), (1,), (3, 11), (3, 1), (2, 1, 11), (2, 3, 11)])
@pytest.mark.parametrize("value_shape", [(3, 5), (1, 5), None])
def test_is_equation_11_over_causal_attention(value_shape: tuple[int, ...] | None, sink_shape: tuple[int, ...]):
    q, k, v = (drawn(2, 3, 11, 5) for _ in range(3))
    gamma = torch.tensor([0.5, 0.1, 0.0], dtype=torch.float64)
    sink, value = drawn(*sink_shape), None if value_shape is None else drawn(*value_shape)
    causal, lse = oracle(q, k, v, gamma=INF)
    out, new_lse = remask(causal, lse, log_mass(gamma, torch.arange(11), 20), sink=sink, sink_value=value)
    each = None if value is None else value.expand(3, 5)
    expected, expected_lse = oracle(q, k, v, gamma=gamma, length=20, sink=sink, sink_value=each)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(new_lse, expected_lse)


@pytest.mark.parametrize("sink_shape", [(), (3,), (3, 5), (2, 1, 1)])
@pytest.mark.parametrize("value_shape", [(3, 4), (1, 4), None])
def test_gradients_in_all_five(value_shape: tuple[int, ...] | None, sink_shape: tuple[int, ...]):
    tensors = [drawn(2, 3, 5, 4), drawn(2, 3, 5), drawn(1, 5), drawn(*sink_shape)]
    tensors += [] if value_shape is None else [drawn(*value_shape)]

    def run(out: Tensor, lse: Tensor, mass: Tensor, sink: Tensor, value: Tensor | None = None) -> Any:
        return remask(out, lse, mass, sink=sink, sink_value=value)

    inputs = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("reaches_lse", [False, True])
def test_the_gradients_from_what_the_epilogue_returns(reaches_lse: bool):
    """log_mass_grad and sink_value_grads see (out', lse') alone; remask's own backward sees (out, lse)."""
    out, lse, mass = drawn(2, 3, 5, 4), drawn(2, 3, 5), drawn(3, 5)
    sink, value = drawn(3, requires_grad=True), drawn(3, 4, requires_grad=True)
    new_out, new_lse = remask(out, lse, mass, sink=sink, sink_value=value)
    grad_out, grad_lse = torch.randn_like(new_out), torch.randn_like(new_lse) if reaches_lse else None
    loss = (new_out * grad_out).sum() + (0.0 if grad_lse is None else (new_lse * grad_lse).sum())
    expected = torch.autograd.grad(loss, (sink, value))
    with torch.no_grad():
        column = sink.unsqueeze(-1)
        of_mass = log_mass_grad(grad_out, new_out, new_lse, torch.logaddexp(mass, column), grad_lse)
        of_sink, of_value = sink_value_grads(grad_out, new_lse, column, value)
        of_sink = of_sink + (of_mass * torch.exp(column - torch.logaddexp(mass, column))).sum(-1, keepdim=True)
    torch.testing.assert_close((of_sink.squeeze(-1), of_value), expected)


def test_where_shares_are_0_or_1():
    """A sink, a mass and scores of -inf: out exact, gradients finite, 0 where nothing can change."""
    lse = torch.tensor([0.0, -INF, -INF, -INF, 0.0], dtype=torch.float64, requires_grad=True)
    mass = torch.tensor([-INF, -INF, 0.0, -INF, -INF], dtype=torch.float64, requires_grad=True)
    sink = torch.tensor([[-INF, 0.0, 0.0, -INF, 0.0]], dtype=torch.float64, requires_grad=True)
    out = torch.ones(1, 5, 2, dtype=torch.float64, requires_grad=True)
    value = torch.full((1, 2), 4.0, dtype=torch.float64, requires_grad=True)
    new_out, new_lse = remask(out, lse.unsqueeze(0), mass, sink=sink, sink_value=value)
    assert new_out[0, :, 0].tolist() == [1.0, 4.0, 2.0, 0.0, 2.5]
    assert new_lse[0].tolist() == [0.0, 0.0, pytest.approx(math.log(2)), -INF, pytest.approx(math.log(2))]
    new_out.sum().backward()
    for grad in (out.grad, lse.grad, mass.grad, sink.grad, value.grad):
        assert grad is not None
        assert torch.isfinite(grad).all()
    assert sink.grad is not None
    assert sink.grad[0].tolist() == [0.0, 0.0, pytest.approx(2.0), 0.0, pytest.approx(1.5)]
    assert value.grad is not None
    assert value.grad.tolist() == [[pytest.approx(2.0)] * 2]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_a_fully_masked_row_goes_no_further(dtype: torch.dtype, in_place: bool):
    out, lse = torch.randn(2, 3, 5, 4).to(dtype), torch.randn(2, 3, 5)
    lse[0, 1, 2], out[0, 1, 2] = -INF, math.nan
    sink, value = torch.randn(3, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    mass = Mass(sink.detach()[:, None], sink_HS=sink.detach()[:, None], sink_value_HD=value.detach())
    new_out, new_lse = epilogue(out.clone(), lse, mass, in_place=in_place)
    assert torch.isfinite(new_out).all()
    assert torch.equal(new_out[0, 1, 2], value[1].to(dtype))
    out.requires_grad_()
    lse.requires_grad_()
    again = remask(out, lse, torch.full((1,), -INF), sink=sink, sink_value=value)
    torch.testing.assert_close(again, (new_out, new_lse))
    for grad in torch.autograd.grad(again[0].sum(), (out, lse, sink, value)):
        assert torch.isfinite(grad).all()
        assert grad.any()


def test_low_precision_is_rounded_once():
    """s * o and p_sink * v are added before the rounding to out's dtype: half a unit of it from the exact sum."""
    out, lse, sink, value = torch.randn(2, 3, 500, 4).bfloat16(), torch.randn(2, 3, 500), torch.randn(3, 1), torch.randn(3, 4)
    for in_place in (False, True):
        new_out, _ = epilogue(out.clone(), lse, Mass(sink, sink_HS=sink, sink_value_HD=value), in_place=in_place)
        exact, _ = remask(
            out.double(), lse.double(), torch.full((1,), -INF).double(), sink=sink.double(), sink_value=value.double()
        )
        unit = torch.finfo(torch.bfloat16).eps * torch.exp2(torch.frexp(exact.float()).exponent - 1.0)
        assert ((new_out.double() - exact).abs() <= 0.5001 * unit).all()


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ({"sink_value": torch.zeros(3, 4)}, ValueError, "sink is required where sink_value is given"),
        ({"sink": 1.0}, TypeError, "sink must be a tensor, got float"),
        ({"sink": torch.zeros(3).long()}, TypeError, "sink must be a floating tensor, got dtype torch.int64"),
        ({"sink": torch.zeros(2)}, ValueError, r"sink must have one value for each of the 3 heads of lse, got 2"),
        ({"sink": torch.zeros(2, 5)}, ValueError, r"sink must be \(H,\) or broadcastable to lse, \(2, 3, 5\), got \(2, 5\)"),
        ({"sink": torch.zeros(3, device="meta")}, ValueError, "sink must be on the device of out, cpu, got meta"),
        ({"sink": torch.zeros(3), "sink_value": 1.0}, TypeError, "sink_value must be a tensor, got float"),
        ({"sink": torch.zeros(3), "sink_value": torch.zeros(2, 4)}, ValueError, r"sink_value must be \(H, D\) = \(3, 4\), got"),
        ({"sink": torch.zeros(3), "sink_value": torch.zeros(3, 5)}, ValueError, r"sink_value must be \(H, D\) = \(3, 4\), got"),
        ({"sink": torch.zeros(3), "sink_value": torch.zeros(4)}, ValueError, r"sink_value must be \(H, D\) = \(3, 4\), got"),
    ],
)
def test_refused(options: dict[str, Any], error: type[Exception], why: str):
    with pytest.raises(error, match=why):
        remask(torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5), torch.zeros(1, 5), **options)


def test_without_heads_and_with_more_dimensions():
    """(S, D) has one head; beyond four dimensions heads are the third last, as everywhere."""
    for shape in ((5, 4), (2, 1, 3, 5, 4)):
        heads = shape[-3] if len(shape) > 2 else 1
        out, lse, sink, value = drawn(*shape), drawn(*shape[:-1]), drawn(heads), drawn(heads, 4)
        new_out, new_lse = remask(out, lse, torch.full((1,), -INF).double(), sink=sink, sink_value=value)
        column = sink if len(shape) == 2 else sink.unsqueeze(-1)
        expected = torch.logaddexp(lse, column.expand_as(lse))
        torch.testing.assert_close(new_lse, expected)
        value = value[0] if len(shape) == 2 else value.unsqueeze(-2)
        parts = torch.exp(lse - expected).unsqueeze(-1) * out, torch.exp(column - expected).unsqueeze(-1) * value
        torch.testing.assert_close(new_out, parts[0] + parts[1])
