"""Shares by column, by kind and in cells against the oracle's matrix; attention in a window against the oracle behind a mask."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from sm_flex import stablemask
from sm_flex.diagnostics import attention_map, column_shares, first_token_share, real_share, token_kinds, windowed_attention
from sm_flex.diagnostics.columns import cell_of_slots
from sm_flex.engines import dense
from sm_flex.testing import oracle
from sm_flex.testing.tolerance import assert_within
from tests.core.test_diagnostics import Largest, matrix
from tests.helpers.problems import alibi, alibi_bias, qkv

S = 53
GAMMA = torch.linspace(0.02, 0.9, 6).double()
KINDS = torch.randint(0, 3, (S,), generator=torch.Generator().manual_seed(1))
EACH = torch.stack([torch.arange(S), torch.arange(S) // 2])
DISTANCE = torch.arange(S).unsqueeze(1) - torch.arange(S)
SEEN = torch.rand(2, 6, S, S, generator=torch.Generator().manual_seed(2)) > 0.3
BLOCKS = create_block_mask(lambda b, h, i, j: i - j < 9 + h, 1, 6, S, S, device="cpu", BLOCK_SIZE=16)
# name: the StableMask's arguments or None, those of column_shares, those of the oracle
PROBLEMS: dict[str, tuple[dict[str, Any] | None, dict[str, Any], dict[str, Any]]] = {
    "causal": (None, {}, {"gamma": math.inf}),
    "stablemask": ({"length": S}, {}, {"gamma": GAMMA}),
    "beyond the length": ({"length": 11}, {}, {"gamma": GAMMA, "length": 11}),
    "positions": ({"length": 90, "positions": EACH}, {}, {"gamma": GAMMA, "length": 90, "positions": EACH}),
    "alibi": ({"length": S, "score_mod": alibi}, {"scale": 0.7}, {"gamma": GAMMA, "bias": alibi_bias(6, S), "scale": 0.7}),
    "sinks": ({"length": S, "sink": torch.arange(6.0).double()}, {}, {"gamma": GAMMA, "sink": torch.arange(6.0).double()}),
    "visible": ({"length": S}, {"visible": SEEN}, {"gamma": GAMMA, "visible": SEEN}),
    "sliding": ({"length": S}, {"sliding": 11}, {"gamma": GAMMA, "visible": DISTANCE < 11}),
    "block mask": (
        {"length": S}, {"visible": BLOCKS}, {"gamma": GAMMA, "visible": (9 + torch.arange(6)).reshape(6, 1, 1) > DISTANCE}
    ),
}  # fmt: skip


def mask_of(given: dict[str, Any] | None) -> Any:
    return None if given is None else stablemask(GAMMA, **given)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_share_is_a_sum_over_the_matrix(name: str, blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocks:
        monkeypatch.setattr(dense, "BLOCK_SCORES", 1)
        monkeypatch.setattr(dense, "MIN_ROWS", 7)
    given, kwargs, oracle_kwargs = PROBLEMS[name]
    q, k, _ = qkv(2, 6, 3, S, S, 8)
    reference = matrix(q, k, **oracle_kwargs)
    found = column_shares(q, k, mask_of(given), kinds=KINDS, apart=5, cells=8, **kwargs)
    assert_within(found.first, reference[..., 0], 1e-10, "first")
    assert_within(found.real, reference.sum(-1), 1e-10, "real share")
    for j in range(S - 5):
        assert_within(found.columns[..., j], reference[..., j + 5 :, j].mean(-1), 1e-10, f"column {j}")
    assert found.columns[..., S - 5 :].isnan().all()
    assert found.kinds is not None
    for kind in range(3):
        assert_within(found.kinds[..., kind], reference[..., kind == KINDS].sum(-1), 1e-10, f"kind {kind}")
    assert found.cells is not None
    cell, causal = cell_of_slots(S, 8), DISTANCE >= 0
    assert cell.bincount().tolist() == [1, 8, 7, 8, 7, 8, 7, 7]
    for i in range(8):
        for j in range(8):
            inside = (cell == i).unsqueeze(1) & (cell == j) & causal
            expected = reference[..., inside].mean(-1) if inside.any() else torch.zeros(2, 6)
            assert_within(found.cells[..., i, j], expected, 1e-10, f"cell {i}, {j}")


def test_it_agrees_with_the_other_diagnostics_and_with_none_asked() -> None:
    q, k, _ = qkv(2, 6, 3, S, S, 8, torch.bfloat16)
    mask = stablemask(GAMMA.float(), length=S)
    found = column_shares(q, k, mask)
    assert found.kinds is None
    assert found.cells is None
    assert found.first.dtype == found.columns.dtype == torch.float32
    torch.testing.assert_close(found.first, first_token_share(q, k, mask))
    torch.testing.assert_close(found.real, real_share(q, k, mask))
    counts = torch.arange(S, 0, -1)
    torch.testing.assert_close(found.columns * counts, attention_map(q, k, mask).sum(2))


def test_cells_of_a_short_sequence_are_the_matrix() -> None:
    q, k, _ = qkv(1, 2, 2, 7, 7, 8)
    found = column_shares(q, k, None, cells=7).cells
    torch.testing.assert_close(found, attention_map(q, k, None))
    one = column_shares(q[:, :, :1], k[:, :, :1], None, cells=1).cells
    assert one is not None
    assert one.tolist() == [[[[1.0]], [[1.0]]]]


def test_no_matrix_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor grows with S, not with its square."""
    monkeypatch.setattr(dense, "BLOCK_SCORES", 1)

    def largest(length: int) -> tuple[int, int]:
        q, k, v = qkv(1, 2, 1, length, length, 8, torch.float32)
        mask, kinds = stablemask(0.1, length=length), torch.zeros(length, dtype=torch.long)
        with Largest() as shares:
            column_shares(q, k, mask, kinds=kinds, apart=64, cells=48)
        with Largest() as window:
            windowed_attention(q, k, v, mask, window=100, keep=4)
        return shares.elements, window.elements

    short, long = largest(512), largest(4096)
    for a, b in zip(short, long, strict=True):
        assert b <= 8 * a
        assert b < 4096 * 4096 // 20


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "block mask"])
@pytest.mark.parametrize(("window", "keep"), [(1, 0), (7, 0), (7, 4), (20, 0), (20, 30), (S, 0), (99, 1)])
def test_a_window_is_the_oracle_behind_its_mask(window: int, keep: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masses by position, functions of the scores by slot: what a window drops changes neither."""
    monkeypatch.setattr("sm_flex.diagnostics.windows.MIN_ROWS", 6)
    given, kwargs, oracle_kwargs = PROBLEMS[name]
    q, k, v = qkv(2, 6, 3, S, S, 8, v_dim=5)
    shown = (window > DISTANCE) | (torch.arange(S) < keep)
    visible = oracle_kwargs.get("visible")
    expected, _ = oracle(q, k, v, **{**oracle_kwargs, "visible": shown if visible is None else shown & visible})
    found = windowed_attention(q, k, v, mask_of(given), window=window, keep=keep, **kwargs)
    assert found.dtype == torch.float64
    assert_within(found, expected, 1e-10)
    whole, _ = oracle(q, k, v, **oracle_kwargs)
    changed = window < (11 if name == "sliding" else S) and keep < S - window
    assert ((found - whole).abs().max() > 1e-3) == changed


@pytest.mark.parametrize("shape", [(6, S), (2, 6, S), (1, S), (2, 6, 1)])
def test_a_window_with_a_table_of_sinks(shape: tuple[int, ...]) -> None:
    q, k, v = qkv(2, 6, 3, S, S, 8)
    sink = torch.randn(shape).double()
    mask = stablemask(math.inf, length=S, sink=sink)
    expected, _ = oracle(q, k, v, gamma=math.inf, sink=sink.expand(2, 6, S), visible=DISTANCE < 5)
    assert_within(windowed_attention(q, k, v, mask, window=5), expected, 1e-10)


def test_a_visible_of_one_row_or_column_is_that_of_all() -> None:
    q, k, v = qkv(2, 6, 3, S, S, 8)
    for visible in (SEEN[:1, :1, :1], SEEN[:1, :, :, :1], SEEN[0, 0, 3]):
        shown = visible.expand(1, visible.shape[1] if visible.dim() == 4 else 1, S, S)
        expected, _ = oracle(q, k, v, gamma=math.inf, visible=shown & (DISTANCE < 9))
        assert_within(windowed_attention(q, k, v, None, window=9, visible=visible), expected, 1e-10)


def test_kinds_of_tokens() -> None:
    texts = [".", "word", ",", " .\n", "", "9\ufffd", "\ufffd", "«", "a.", "。", "ß", " "]
    assert token_kinds(texts).tolist() == [0, 2, 1, 1, 1, 2, 2, 1, 2, 1, 2, 1]
    assert token_kinds([]).tolist() == []
    with pytest.raises(TypeError, match="tokens must be the texts of the tokens, one str each"):
        token_kinds("word")
    with pytest.raises(TypeError, match="decode the ids one by one"):
        token_kinds([1, 2])  # pyright: ignore[reportArgumentType]


Q, K, V = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
UNORDERED = stablemask(0.5, length=9, positions=torch.arange(7), ordered=False)
SHARES: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (Q[:, :, :3], {}, ValueError, "takes whole sequences, got S=3 queries and T=7 keys"),
    (Q, {"kinds": [0] * 7}, TypeError, "kinds must be"),
    (Q, {"kinds": torch.zeros(7)}, TypeError, "kinds must be"),
    (Q, {"kinds": torch.zeros(6).long()}, ValueError, r"kinds must be \(7,\) on cpu, one for each key, got \(6,\)"),
    (Q, {"kinds": torch.arange(7) - 1}, ValueError, "kinds must be >= 0"),
    (Q, {"apart": -1}, ValueError, "apart must be an int >= 0, got -1"),
    (Q, {"apart": True}, ValueError, "apart must be an int >= 0, got True"),
    (Q, {"sliding": 0}, ValueError, "sliding must be an int >= 1, got 0"),
    (Q, {"cells": 8}, ValueError, "cells must be an int from 1 to S=7, got 8"),
    (Q, {"cells": 1}, ValueError, "cells must be at least 2 where S > 1"),
    (Q, {"scale": "1"}, TypeError, "scale must be a number"),
]
WINDOWS: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
    (Q[:, :, :3], None, {"window": 3}, ValueError, "takes whole sequences, got S=3 queries and T=7 keys"),
    (Q, 0.5, {"window": 3}, TypeError, "mask must be a StableMask, or None.*got float"),
    (Q, UNORDERED, {"window": 3}, NotImplementedError, "ordered=False"),
    (Q, None, {"window": 0}, ValueError, "window must be an int >= 1, got 0"),
    (Q, None, {"window": 2.0}, ValueError, "window must be an int >= 1, got 2.0"),
    (Q, None, {"window": None}, ValueError, "window and keep must be ints, got None"),
    (Q, None, {"window": 3, "sliding": 0}, ValueError, "sliding must be an int >= 1, got 0"),
    (Q, None, {"window": 3, "keep": -1}, ValueError, "keep must be an int >= 0, got -1"),
    (Q, None, {"window": 3, "visible": torch.zeros(7, 7)}, TypeError, "visible must be a boolean tensor"),
    (Q, None, {"window": 3, "visible": BLOCKS}, TypeError, "visible must be a boolean tensor or None, got BlockMask"),
    (Q, None, {"window": 3, "visible": torch.ones(6, 7) > 0}, ValueError, "visible must be broadcastable"),
]


@pytest.mark.parametrize(("query", "kwargs", "error", "message"), SHARES)
def test_bad_input_to_the_shares(query: Any, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    positions = torch.arange(query.shape[2])
    with pytest.raises(error, match=message):
        column_shares(query, K, stablemask(0.5, length=9, positions=positions), **kwargs)


@pytest.mark.parametrize(("query", "mask", "kwargs", "error", "message"), WINDOWS)
def test_bad_input_to_the_window(query: Any, mask: Any, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        windowed_attention(query, K, V, mask, **kwargs)


def test_no_gradient_is_kept_of_the_shares() -> None:
    q, k = Q.clone().requires_grad_(), K.clone().requires_grad_()
    shares: list[Tensor | None] = list(column_shares(q, k, None, kinds=torch.zeros(7).long(), cells=3))
    assert not any(x.requires_grad for x in shares if x is not None)
