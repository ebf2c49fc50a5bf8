"""The laws of StableMask (sm_flex.testing.laws) on every way into the library, and those that need its own functions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from benchmarks.fuzz.entry_points import CPU_PATHS
from sm_flex import flex_attention, headwise_gamma, log_mass, stablemask
from sm_flex.testing import Problem, check_attention
from sm_flex.testing.strategies import problems
from tests.helpers.problems import DTYPES

# What a way in cannot express: this much is not run, and everything else is.
NOT_RUN = {
    "flex_attention, cpu": {"masks", "packed_is_one_by_one", "padding_changes_nothing"},
    "scaled_dot_product_attention, cpu, boolean mask": {"log_sum_exp", "gradient_of_lse"},
    "scaled_dot_product_attention, cpu, float mask": {"log_sum_exp", "gradient_of_lse"},
    "scaled_dot_product_attention, dense, boolean mask": {"log_sum_exp", "gradient_of_lse"},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", CPU_PATHS)
def test_every_way_in_keeps_every_law(path: str, dtype: torch.dtype):
    examples = max(1, settings.default.max_examples // (3 if dtype == torch.float64 else 8))  # pyright: ignore
    report = check_attention(CPU_PATHS[path], dtype=dtype, max_examples=examples)
    assert set(report.not_run) == NOT_RUN.get(path, set())


@given(problems(takes=("grouped",)))
def test_identical_tokens_have_rising_odds(problem: Problem):
    """Section 4.2, where alpha has long rounded to 1: l - log M strictly increases up to row N-1, where it is infinite."""
    q, k, v = problem.qkv
    q, k = (x[:, :, :1].expand(-1, -1, problem.num_keys, -1) for x in (q, k))
    _, lse = flex_attention(q, k, v, score_mod=stablemask(math.inf), enable_gqa=True, return_lse=True)
    rows = min(problem.num_queries, problem.length - 1)
    odds = (lse - log_mass(problem.gamma_H, torch.arange(problem.num_queries), problem.length))[..., :rows]
    odds = odds[torch.isfinite(odds).all(-1)]
    assert (odds.diff(dim=-1) > 0).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@given(problems(takes=("grouped",)))
def test_lse_is_that_of_torchs_flex_over_presoftmax(problem: Problem):
    """l' is the log-sum-exp of the whole row of A_SM, as torch's own flex_attention computes it from eq. 8."""
    q, k, v = problem.qkv
    mask = stablemask(problem.gamma_H.clamp(max=1e4))  # 0 * inf is NaN in eq. 8 as printed
    _, aux = torch_flex_attention(q, k, v, score_mod=mask.presoftmax, enable_gqa=True, return_aux=AuxRequest(lse=True))
    assert aux.lse is not None
    _, lse = flex_attention(q, k, v, score_mod=mask, enable_gqa=True, return_lse=True)
    # torch's eager flex keeps lse in float32 terms of log 2.
    torch.testing.assert_close(lse, aux.lse.double(), rtol=1e-5, atol=1e-5)


@given(st.integers(1, 70))
def test_headwise_gammas_are_distinct_and_below_one(heads: int):
    gamma = headwise_gamma(heads)
    assert gamma.shape == (heads,)
    assert len(set(gamma.tolist())) == heads
    assert (gamma > 0).all()
    assert (gamma < 1).all()
