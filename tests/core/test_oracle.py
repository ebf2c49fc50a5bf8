"""The oracle and the tolerance, against numbers worked out by hand and against planted errors."""

import math

import pytest
import torch
from torch import Tensor

from sm_flex.testing import assert_within_error_budget, oracle


def test_two_rows_by_hand():
    """N = 3, gamma = ln 2, scores 0: row 0 has 1 + 1/2 + 1/4, row 1 has 2 + 1/4."""
    q = k = torch.zeros(1, 1, 2, 4)
    v = torch.tensor([[1.0], [3.0]]).reshape(1, 1, 2, 1)
    out, lse = oracle(q, k, v, gamma=math.log(2), length=3)
    assert out.flatten().tolist() == pytest.approx([1 / 1.75, 4 / 2.25])
    assert lse.flatten().exp().tolist() == pytest.approx([1.75, 2.25])


def test_rows_from_the_training_length_on():
    """Row N-1 is plain causal; row p >= N has the one pseudo score -(p+1) gamma."""
    q = k = torch.zeros(1, 1, 4, 4)
    out, lse = oracle(q, k, torch.ones(1, 1, 4, 1), gamma=0.5, length=3)
    assert out.flatten()[2].item() == pytest.approx(1.0)
    assert lse.flatten()[3].exp().item() == pytest.approx(4 + math.exp(-4 * 0.5))
    assert out.flatten()[3].item() == pytest.approx(4 / (4 + math.exp(-2)))


def test_equation_11_matrix():
    """Eq. 29 of appendix C: xi_i = i / (i + sum_{j=i}^{n-1} e^{-j gamma}) for scores 0, i from 1."""
    n, gamma = 7, 0.3
    q = torch.zeros(1, 1, n, 2)
    out, _ = oracle(q, q, torch.ones(1, 1, n, 1), gamma=gamma)
    expected = [i / (i + sum(math.exp(-j * gamma) for j in range(i, n))) for i in range(1, n + 1)]
    assert out.flatten().tolist() == pytest.approx(expected)


def test_fully_masked_row_is_zero_and_grouped_heads_share_keys():
    q, k, v = torch.randn(1, 6, 5, 3), torch.randn(1, 2, 5, 3), torch.randn(1, 2, 5, 3)
    visible = torch.ones(5, 5, dtype=torch.bool)
    visible[2] = False
    out, lse = oracle(q, k, v, gamma=math.inf, visible=visible)
    assert out[:, :, 2].abs().max() == 0
    assert torch.isneginf(lse[:, :, 2]).all()
    again, _ = oracle(q[:, 3:4], k[:, 1:], v[:, 1:], gamma=math.inf, visible=visible)
    torch.testing.assert_close(out[:, 3:4], again)


def test_a_sink_by_hand():
    """N = 3, gamma = ln 2, scores 0, e^sink = 1/4: rows with 2 and 2 1/2 in all; its value comes in by that quarter."""
    q = k = torch.zeros(1, 1, 2, 4)
    v = torch.tensor([[1.0], [3.0]]).reshape(1, 1, 2, 1)
    sink = math.log(0.25)
    out, lse = oracle(q, k, v, gamma=math.log(2), length=3, sink=sink)
    assert out.flatten().tolist() == pytest.approx([1 / 2, 4 / 2.5])
    assert lse.flatten().exp().tolist() == pytest.approx([2, 2.5])
    out, again = oracle(q, k, v, gamma=math.log(2), length=3, sink=sink, sink_value=torch.tensor([[10.0]]))
    assert out.flatten().tolist() == pytest.approx([(1 + 0.25 * 10) / 2, (4 + 0.25 * 10) / 2.5])
    assert torch.equal(again, lse)


def problem_with_a_sink(*shape: int) -> list[Tensor]:
    """q, k, v and a sink of the shape: 6 query heads, 2 key heads, 5 rows, values of width 4."""
    shapes = ((2, 6, 5, 3), (2, 2, 5, 3), (2, 2, 5, 4), shape)
    return [torch.randn(x, dtype=torch.float64) for x in shapes]


@pytest.mark.parametrize("shape", [(), (6,), (6, 5), (1, 5), (6, 1), (2, 6, 5), (2, 1, 1)])
def test_a_sink_is_a_key_of_that_score_without_a_value(shape: tuple[int, ...]):
    """Eq. 11 with one more key: query and key have one more dim, in which they multiply to the sink, and its value is 0."""
    q, k, v, sink = problem_with_a_sink(*shape)
    per_head = sink.unsqueeze(-1) if len(shape) == 1 else sink
    wide_q = torch.cat([q * 3**-0.5, per_head.expand(2, 6, 5).unsqueeze(-1)], dim=-1)
    key = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64).expand(2, 2, 1, 4)
    wide_k = torch.cat([key, torch.nn.functional.pad(k, (0, 1))], dim=2)
    wide_v = torch.nn.functional.pad(v, (0, 0, 1, 0))
    expected = oracle(wide_q, wide_k, wide_v, gamma=0.3, length=9, positions=torch.arange(5), scale=1.0)
    torch.testing.assert_close(oracle(q, k, v, gamma=0.3, length=9, sink=sink), expected)


def test_a_sink_of_log_mass_is_the_pseudo_columns_themselves():
    """gamma's columns left out and their log-sum-exp put in as a table: the same output."""
    q, k, v, _ = problem_with_a_sink()
    i, j = torch.arange(5).unsqueeze(1), torch.arange(9)
    log_mass = torch.logsumexp(torch.where(j > i, -0.3 * j.double(), -math.inf), dim=-1)
    expected = oracle(q, k, v, gamma=0.3, length=9)
    torch.testing.assert_close(oracle(q, k, v, gamma=math.inf, length=9, sink=log_mass.unsqueeze(0)), expected)


def test_a_sink_of_minus_infinity_is_none_and_takes_no_gradient():
    q, k, v, sink = problem_with_a_sink(6)
    sink[2:] = -math.inf
    sink_value = torch.randn(6, 4, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, sink, sink_value)]
    out, lse = oracle(q, k, v, gamma=0.3, length=9, sink=sink, sink_value=sink_value)
    without, lse_without = oracle(q, k, v, gamma=0.3, length=9)
    assert torch.equal(out[:, 2:], without[:, 2:])
    assert torch.equal(lse[:, 2:], lse_without[:, 2:])
    assert not torch.equal(out[:, :2], without[:, :2])
    grads = torch.autograd.grad(out.sin().sum() + lse.sum(), leaves)
    assert all(torch.isfinite(grad).all() for grad in grads)
    for grad in grads[3:]:
        assert (grad[2:] == 0).all()
        assert (grad[:2] != 0).any()


def test_a_fully_masked_row_is_the_value_of_its_sink():
    """Without a mass of gamma wholly, beside one by its share, and nothing where the sink is -inf."""
    q, k, v, _ = problem_with_a_sink()
    visible = torch.ones(5, 5, dtype=torch.bool)
    visible[2] = False
    sink = torch.tensor([0.7, 0.7, 0.7, 0.7, 0.7, -math.inf])
    value = torch.randn(6, 4, dtype=torch.float64)
    out, lse = oracle(q, k, v, gamma=math.inf, visible=visible, sink=sink, sink_value=value)
    torch.testing.assert_close(out[:, :5, 2], value[:5].expand(2, -1, -1))
    assert (lse[:, :5, 2] == sink[0]).all()
    assert (out[:, 5, 2] == 0).all()
    assert torch.isneginf(lse[:, 5, 2]).all()
    beside, _ = oracle(q, k, v, gamma=0.0, length=9, visible=visible, sink=sink, sink_value=value)
    share = math.exp(0.7) / (math.exp(0.7) + 6)  # six pseudo columns of score 0 right of row 2
    torch.testing.assert_close(beside[:, :5, 2], share * value[:5].expand(2, -1, -1), rtol=1e-6, atol=0)


def test_a_value_for_each_key_head_is_shared_by_its_query_heads():
    q, k, v, sink = problem_with_a_sink(6)
    value = torch.randn(2, 4, dtype=torch.float64)
    each = oracle(q, k, v, gamma=0.3, sink=sink, sink_value=value.repeat_interleave(3, dim=0))
    torch.testing.assert_close(oracle(q, k, v, gamma=0.3, sink=sink, sink_value=value), each, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 4), (6, 3), (6,), (1, 6, 4)])
def test_a_value_of_another_shape_is_refused(shape: tuple[int, ...]):
    q, k, v, sink = problem_with_a_sink(6)
    with pytest.raises(ValueError, match=r"sink_value must be \(H, Dv\) = \(6, 4\) or \(Hkv, Dv\) = \(2, 4\), got"):
        oracle(q, k, v, gamma=0.3, sink=sink, sink_value=torch.zeros(shape))


def test_a_value_without_a_sink_is_refused():
    q, k, v, _ = problem_with_a_sink()
    with pytest.raises(ValueError, match="sink_value needs a sink"):
        oracle(q, k, v, gamma=0.3, sink_value=torch.zeros(6, 4))


def test_gradients_through_a_sink_and_its_value():
    """By finite differences, in q, k, v, gamma, the sink and its value, of out and lse."""
    q, k, v, sink = problem_with_a_sink(6)
    gamma, value = torch.rand(6, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q[:1], k[:1], v[:1], gamma, sink, value)]

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, sink: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return oracle(q, k, v, gamma=gamma, length=9, sink=sink, sink_value=value)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_tolerance_rejects_what_is_wrong(dtype: torch.dtype):
    """Zeros, plain causal attention, a mass that is off by one row, an output of the neighbour head: all out of budget."""
    q, k, v = (torch.randn(2, 4, 17, 8).to(dtype) for _ in range(3))
    gamma, length = torch.tensor([0.5, 0.2, 0.1, 0.05]), 40
    reference, _ = oracle(q, k, v, gamma=gamma, length=length)
    plain, _ = oracle(q, k, v, gamma=gamma, length=length, dtype=dtype)
    assert_within_error_budget(reference.to(dtype), reference, plain)
    wrong = {
        "zeros": torch.zeros_like(reference),
        "plain causal": oracle(q, k, v, gamma=math.inf, length=length)[0],
        "off by one": oracle(q, k, v, gamma=gamma, length=length, positions=torch.arange(17) + 1)[0],
        "mass follows the call": oracle(q, k, v, gamma=gamma, length=17)[0],
        "gamma of another head": oracle(q, k, v, gamma=gamma.flip(0), length=length)[0],
        "nan": torch.full_like(reference, math.nan),
    }
    for name, answer in wrong.items():
        with pytest.raises(AssertionError):
            assert_within_error_budget(answer.to(dtype), reference, plain, name)
