"""sink_level(): the constant mass that has the first token's mean share, against the whole matrix."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sm_flex import stablemask
from sm_flex.diagnostics import first_token_share, sink_level
from sm_flex.engines import dense
from sm_flex.testing import oracle
from tests.helpers.problems import alibi, alibi_bias

BATCH, HEADS, LENGTH = 2, 6, 37
ROWS = (5, 31)
VISIBLE = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(5)) > 0.3
VISIBLE[..., 0] = True
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "causal": (None, {}, {}),
    "scale": (None, {"scale": 0.9}, {"scale": 0.9}),
    "visible": (None, {"visible": VISIBLE}, {"visible": VISIBLE}),
    "a mass of gamma": (stablemask(0.02, length=50), {}, {"gamma": 0.02, "length": 50}),
    "an inner score_mod": (stablemask(math.inf, score_mod=alibi), {}, {"bias": alibi_bias(HEADS, LENGTH)}),
}


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    q, k = torch.randn(BATCH, HEADS, LENGTH, 8), torch.randn(BATCH, 2, LENGTH, 8)
    k[:, :, 0] *= 2  # so that its share differs by rows
    return q.to(dtype), k.to(dtype)


def shares(q: Tensor, k: Tensor, sink: Tensor | None, gamma: Any = math.inf, length: int | None = None, **given: Any) -> Tensor:
    """Of eq. 11 in float64, (B, H, S): the first token's share, or that of a sink in its place."""
    heads_k = k.shape[1]
    if sink is None:
        v = torch.zeros(BATCH, heads_k, LENGTH, 1, dtype=torch.float64)
        v[:, :, 0] = 1
        return oracle(q, k, v, gamma=gamma, length=length, **given)[0][..., 0]
    seen = given.pop("visible", torch.ones(1, 1, 1, LENGTH, dtype=torch.bool)) & (torch.arange(LENGTH) > 0)
    v, ones = torch.zeros(BATCH, heads_k, LENGTH, 1, dtype=torch.float64), torch.ones(HEADS, 1, dtype=torch.float64)
    return oracle(q, k, v, gamma=gamma, length=length, visible=seen, sink=sink, sink_value=ones, **given)[0][..., 0]


@pytest.mark.parametrize("blocks", [None, 1], ids=["one block", "blocks"])
@pytest.mark.parametrize("name", CASES)
def test_a_mass_of_that_level_has_the_first_tokens_mean_share(
    name: str, blocks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask, given, of_oracle = CASES[name]
    if blocks is not None:
        monkeypatch.setattr(dense, "BLOCK_SCORES", blocks)
        monkeypatch.setattr(dense, "MIN_ROWS", 3)
    q, k = problem()
    level = sink_level(q, k, mask, rows=ROWS, **given)
    assert level.shape == (HEADS,)
    assert level.dtype == torch.float64
    first = shares(q, k, None, **of_oracle)[:, :, slice(*ROWS)].mean((0, 2))
    for shift, same in ((0.0, True), (0.01, False)):
        mass = shares(q, k, level + shift, **of_oracle)[:, :, slice(*ROWS)].mean((0, 2))
        assert bool(((mass - first).abs() < 1e-12).all()) == same


def test_low_precision_inputs_are_looked_at_in_float64() -> None:
    q, k = problem(torch.bfloat16)
    assert torch.equal(sink_level(q, k, rows=ROWS), sink_level(q.double(), k.double(), rows=ROWS))


def test_no_matrix_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "BLOCK_SCORES", 1)
    monkeypatch.setattr(dense, "MIN_ROWS", 4)
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                sizes.append(out.numel())
            return out

    q, k = problem()
    with Sizes():
        sink_level(q, k, rows=ROWS)
    assert max(sizes) <= max(4 * LENGTH * BATCH * HEADS, q.numel())


def test_a_first_token_that_has_nothing_and_one_that_has_all() -> None:
    q, k = problem()
    nobody = torch.arange(LENGTH) > 0
    assert torch.isneginf(sink_level(q, k, rows=ROWS, visible=nobody)).all()
    assert torch.isposinf(sink_level(q, k, rows=ROWS, visible=~nobody)).all()


def test_rows_that_see_nothing_do_not_count() -> None:
    q, k = problem()
    padding = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    padding[20:] = False
    torch.testing.assert_close(
        sink_level(q, k, rows=ROWS, visible=padding), sink_level(q, k, rows=(5, 20)), rtol=1e-12, atol=1e-12
    )


def test_a_share_that_rounds_to_1() -> None:
    """The others have e^-40 of a row each: 1 - share is 0 in float64."""
    q, k = torch.ones(1, 1, 6, 1), torch.zeros(1, 1, 6, 1)
    k[:, :, 0] = 40.0
    assert first_token_share(q.double(), k.double(), None, scale=1.0)[0, 0, 2] == 1
    assert sink_level(q, k, rows=(2, 6), scale=1.0).item() == pytest.approx(40.0, abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "error", "why"),
    [
        ((64, 256), ValueError, r"rows \(64, 256\) are not among the 37 rows of the call: pass earlier ones, or a longer text"),
        ((0, 9), ValueError, r"rows must begin at 1 or later and end after that, got \(0, 9\)"),
        ((9, 9), ValueError, "rows must begin at 1 or later and end after that"),
        (9, TypeError, "rows must be a pair of ints, the first row and the end, got 9"),
        ((1.0, 9), TypeError, "rows must be a pair of ints"),
    ],
)
def test_wrong_rows(rows: Any, error: type, why: str) -> None:
    with pytest.raises(error, match=why):
        sink_level(*problem(), rows=rows)


def test_a_cache_is_refused() -> None:
    q, k = problem()
    with pytest.raises(ValueError, match="query and key must have one length: slot 0 is the first token, got S=1 and T=37"):
        sink_level(q[:, :, -1:], k, rows=ROWS)
