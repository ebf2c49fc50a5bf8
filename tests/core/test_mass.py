"""log M and the head-wise gammas against the sum that they stand for, in 40 digits where it matters."""

import math
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import sm_flex
from sm_flex import headwise_gamma, log_mass, stablemask
from sm_flex.mass.cache import Inputs, cached_table
from sm_flex.mass.closed_form import log_mass_table

GAMMAS = [0.0, 1e-8, 1e-4, 2.0**-8, 0.03, 0.3, 0.5, 0.7, 3.0, 1e4, -1e-5, -1e-3]
LENGTHS = [1, 2, 5, 100, 131072]


def exact(gamma: float, p: int, length: int) -> "mpmath.mpf":  # pyright: ignore
    """log sum_{j=p+1}^{N-1} e^{-j gamma}, or section 4.3's tau for p >= N."""
    with mpmath.workdps(40):
        g, n = mpmath.mpf(gamma), length - 1 - p
        if n < 0:
            return -(p + 1) * g
        if n == 0:
            return mpmath.mpf("-inf")
        return mpmath.log(n) if g == 0 else -(p + 1) * g + mpmath.log(mpmath.expm1(-n * g) / mpmath.expm1(-g))


def exact_slope(gamma: float, p: int, length: int) -> float:
    """d log M / d gamma."""
    n = length - 1 - p
    if n == 0:
        return 0.0
    if n < 0:
        return -(p + 1)
    if gamma == 0:
        return -(p + length) / 2
    with mpmath.workdps(40):
        g = mpmath.mpf(gamma)
        return float(-(p + 1) + n / mpmath.expm1(n * g) - 1 / mpmath.expm1(g))


def corner_positions(length: int) -> torch.Tensor:
    corners = {0, 1, 2, length // 2, length - 3, length - 2, length - 1, length, length + 5}
    return torch.tensor(sorted(p for p in corners if p >= 0))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_value_and_gradient(gamma: float, length: int, dtype: torch.dtype, tolerance: float):
    positions = corner_positions(length)
    g = torch.tensor(gamma, dtype=dtype, requires_grad=True)
    actual = log_mass(g, positions, length)
    assert actual.shape == (1, len(positions))
    assert actual.dtype == dtype
    value = float(g.detach())
    for i, p in enumerate(positions.tolist()):
        expected = exact(value, p, length)
        assert actual[0, i].item() == pytest.approx(float(expected), rel=tolerance, abs=tolerance)
        (slope,) = torch.autograd.grad(actual[0, i], g, retain_graph=True)
        assert slope.item() == pytest.approx(exact_slope(value, p, length), rel=50 * tolerance, abs=50 * tolerance)


@pytest.mark.parametrize("gamma", [0.24995, 0.2499, 0.4999, 0.5, 0.25])
def test_where_the_series_ends(gamma: float):
    """Just below x = gamma or (N-1) gamma of 1/2 each term of the series counts; 1e-14 of it is all that is left out."""
    for p in (0, 1):
        actual = log_mass(torch.tensor(gamma, dtype=torch.float64), torch.tensor([p]), 3).item()
        assert actual == pytest.approx(float(exact(gamma, p, 3)), rel=0, abs=3e-14)


@pytest.mark.parametrize("gamma", [math.inf, torch.tensor(math.inf), 1e30, 3e38, torch.tensor(3e38)])
def test_infinite_gamma_has_no_mass(gamma: float | torch.Tensor):
    assert torch.isneginf(log_mass(gamma, torch.arange(5), 9)).all()


def test_gradient_is_finite_and_zero_without_mass():
    g = torch.tensor([math.inf, 0.5], requires_grad=True)
    log_m = log_mass(g, torch.tensor([0, 8]), 9)
    log_m.masked_fill(torch.isneginf(log_m), 0.0).sum().backward()
    assert g.grad is not None
    assert g.grad[0] == 0
    assert torch.isfinite(g.grad).all()


def test_every_position_of_a_long_sequence():
    """All 131072 positions in float32 against the running sum in float64."""
    length, gamma = 131072, 2.0**-8
    terms = torch.exp(-torch.arange(length, dtype=torch.float64) * gamma)
    tail = terms.flip(0).cumsum(0).flip(0)
    head = slice(0, 100_000 // 8)  # beyond, the float64 sum itself underflows to its last term
    actual = log_mass(gamma, torch.arange(length), length)[0]
    torch.testing.assert_close(actual[head], tail[1:].log()[head].float(), rtol=1e-6, atol=2e-6)
    assert torch.isneginf(actual[-1])
    assert torch.isfinite(actual[:-1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_gamma_over_131072_positions(dtype: torch.dtype):
    """float32 rounds what float64 says at every position; float64 is mpmath's at some of each stretch, to the last and beyond."""
    length = 131072
    positions = torch.cat([torch.arange(length), length + torch.arange(5)])
    gamma = torch.cat([headwise_gamma(16), torch.tensor([0.0, 1e-8, 1e-5, 1e4])])
    actual = log_mass(gamma.to(dtype), positions, length)
    torch.testing.assert_close(actual, log_mass(gamma.double(), positions, length).to(dtype), rtol=0, atol=0)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-7
    for number, row in zip(gamma.double().tolist(), actual.tolist(), strict=True):
        for p in (1, 1000, length // 2, length - 100, length + 3):
            assert row[p] == pytest.approx(float(exact(number, p, length)), rel=tolerance, abs=tolerance)


def test_a_number_is_rounded_once():
    """A gamma given as a number is float64 to the end: only log M itself is rounded to float32."""
    positions = torch.arange(5000)
    same_gamma = torch.tensor(0.1, dtype=torch.float64)
    assert torch.equal(log_mass(0.1, positions, 6000), log_mass(same_gamma, positions, 6000).float())
    assert not torch.equal(log_mass(0.1, positions, 6000), log_mass(torch.tensor(0.1), positions, 6000))


def test_packed_documents_start_again():
    gamma = torch.tensor([0.5, 0.1], dtype=torch.float64)
    cu = torch.tensor([0, 3, 3, 10, 11], dtype=torch.int32)
    packed = log_mass_table(gamma, None, cu, None, 20, 11, torch.float64)
    alone = [log_mass(gamma, torch.arange(n), 20) for n in (3, 7, 1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=0)


def test_gammas_for_no_head_are_refused():
    for heads in (0, -1):
        with pytest.raises(ValueError, match=f"at least 1, got {heads}"):
            headwise_gamma(heads)


def test_shapes():
    assert log_mass(0.5, torch.arange(7), 7).shape == (1, 7)
    assert log_mass(torch.rand(3), torch.arange(7), 7).shape == (3, 7)
    assert log_mass(0.5, torch.arange(14).reshape(2, 7), 14).shape == (2, 1, 7)
    assert log_mass(torch.rand(3), torch.arange(14).reshape(2, 7), 14).shape == (2, 3, 7)
    assert log_mass(0.5, torch.arange(7), 7).dtype == torch.float32
    assert log_mass(torch.tensor(0.5).double(), torch.arange(7), 7).dtype == torch.float64


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16, 64])
def test_headwise_is_alibi_on_powers_of_two(heads: int):
    expected = [2 ** (-8 * h / heads) for h in range(1, heads + 1)]
    assert headwise_gamma(heads).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("heads", "expected"),
    [(3, [2**-4, 2**-8, 2**-2]), (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])],
)
def test_headwise_between_powers_of_two(heads: int, expected: list[float]):
    """The powers of two first, then every other slope of the next: as ALiBi's get_slopes."""
    assert headwise_gamma(heads).tolist() == pytest.approx(expected)


def test_headwise_twelve_heads_as_alibi():
    eight = [2.0 ** -(h + 1) for h in range(8)]
    assert headwise_gamma(12).tolist() == pytest.approx([*eight, *(2 ** (-(h + 0.5)) for h in range(4))], rel=1e-6)


def test_a_stablemask_survives_pickling():
    again = pickle.loads(pickle.dumps(stablemask(0.5, length=7)))
    assert again.gamma == 0.5
    assert again.length == 7


def shared(gamma: Tensor, positions: Tensor | None, dtype: torch.dtype, length: int = 50) -> Tensor:
    return cached_table(Inputs(gamma, positions, None, None, length, 7, dtype))


def test_a_shared_table_is_found_again_by_value_and_by_nothing_else() -> None:
    gamma, positions = torch.tensor([0.5, 0.125]), torch.arange(7)
    first = shared(gamma, positions, torch.float32)
    assert shared(gamma.clone(), positions.clone(), torch.float32) is first
    with torch.inference_mode():
        assert shared(gamma, positions, torch.float32) is first
    assert shared(gamma.double(), positions, torch.float32) is first
    others = [
        shared(gamma, positions, torch.float32, length=51),
        shared(gamma, positions + 1, torch.float32),
        shared(gamma, None, torch.float32),
        shared(gamma, positions, torch.float64),
    ]
    assert all(other is not first for other in others)


def test_a_gamma_or_positions_changed_in_place_are_noticed() -> None:
    gamma, positions = torch.tensor([0.5, 0.25]), torch.arange(7)
    before = shared(gamma, positions, torch.float64)
    gamma.data.fill_(0.125)  # which even the version of a tensor does not show
    positions.data.add_(3)
    after = shared(gamma, positions, torch.float64)
    torch.testing.assert_close(after, log_mass_table(gamma, positions, None, None, 50, 7, torch.float64), rtol=0, atol=0)
    assert not torch.equal(after, before)


def test_a_table_first_made_in_inference_mode_serves_training() -> None:
    q = torch.randn(1, 2, 9, 8, requires_grad=True)
    mask = stablemask(0.3125, length=77)
    with torch.inference_mode():
        sm_flex.flex_attention(q, q, q, score_mod=mask)
    sm_flex.flex_attention(q, q, q, score_mod=mask).sum().backward()
    assert q.grad is not None


def test_what_log_mass_returns_may_be_written_to() -> None:
    q = torch.randn(1, 2, 9, 8)
    mask = stablemask(torch.tensor([0.3, 0.2]), length=9)
    before = sm_flex.flex_attention(q, q, q, score_mod=mask)
    log_mass(mask.gamma, torch.arange(9), 9).fill_(0.0)
    assert torch.equal(sm_flex.flex_attention(q, q, q, score_mod=mask), before)


def test_a_learned_gamma_has_its_own_table() -> None:
    gamma = torch.tensor([0.5, 0.25], requires_grad=True)
    tables = [shared(gamma, None, torch.float64) for _ in range(2)]
    assert tables[0] is not tables[1]
    assert tables[1].requires_grad


def test_threads_that_share_the_tables() -> None:
    """Each thread asks for tables that the others push out."""

    def ask(thread: int) -> None:
        for i in range(200):
            gamma = torch.tensor([0.5, thread + i % 7 + 0.25])
            table = shared(gamma, None, torch.float64)
            assert torch.equal(table, log_mass_table(gamma, None, None, None, 50, 7, torch.float64))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(ask, range(6)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.filterwarnings("ignore")
def test_a_forward_mode_tangent_of_gamma_is_never_lost() -> None:
    gamma, q = torch.tensor([0.5, 0.25]), torch.randn(1, 2, 7, 8)
    sm_flex.flex_attention(q, q, q, score_mod=stablemask(gamma, length=50))  # its table is known now
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(gamma, torch.ones(2))
        with pytest.raises(NotImplementedError, match="jvp"):
            sm_flex.flex_attention(q, q, q, score_mod=stablemask(dual, length=50))
        assert forward_ad.unpack_dual(log_mass(dual, torch.arange(7), 50)).tangent is not None


@pytest.mark.filterwarnings("ignore")
def test_a_trace_does_not_keep_a_known_table() -> None:
    q, positions = torch.randn(1, 2, 7, 8), torch.arange(7)

    def attend(q: Tensor, positions: Tensor) -> Tensor:
        return sm_flex.flex_attention(q, q, q, score_mod=stablemask(0.25, length=50, positions=positions))

    attend(q, positions)
    traced: Any = torch.jit.trace(attend, (q, positions), check_trace=False)
    torch.testing.assert_close(traced(q, positions + 9), attend(q, positions + 9))
