"""The oracle and the judge, against numbers worked out by hand and against planted errors."""

import math

import pytest
import torch

from sm_flex.testing import assert_as_good_as, oracle


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


def test_dead_row_is_zero_and_grouped_heads_share_keys():
    q, k, v = torch.randn(1, 6, 5, 3), torch.randn(1, 2, 5, 3), torch.randn(1, 2, 5, 3)
    visible = torch.ones(5, 5, dtype=torch.bool)
    visible[2] = False
    out, lse = oracle(q, k, v, gamma=math.inf, visible=visible)
    assert out[:, :, 2].abs().max() == 0
    assert torch.isneginf(lse[:, :, 2]).all()
    again, _ = oracle(q[:, 3:4], k[:, 1:], v[:, 1:], gamma=math.inf, visible=visible)
    torch.testing.assert_close(out[:, 3:4], again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_judge_rejects_what_is_wrong(dtype: torch.dtype):
    """Zeros, plain causal attention, a mass that is off by one row, an output of the neighbour head: all out of budget."""
    q, k, v = (torch.randn(2, 4, 17, 8).to(dtype) for _ in range(3))
    gamma, length = torch.tensor([0.5, 0.2, 0.1, 0.05]), 40
    reference, _ = oracle(q, k, v, gamma=gamma, length=length)
    plain, _ = oracle(q, k, v, gamma=gamma, length=length, dtype=dtype)
    assert_as_good_as(reference.to(dtype), reference, plain)
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
            assert_as_good_as(answer.to(dtype), reference, plain, name)
