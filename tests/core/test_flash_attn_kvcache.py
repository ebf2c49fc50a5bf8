"""flash_attn_with_kvcache: the cache is written in place, and the queries attend to what it then holds."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sm_flex import headwise_gamma, stablemask
from sm_flex.flash_attn import flash_attn_func, flash_attn_with_kvcache
from tests.helpers.flash_attn import MASKED, options, reference, rows_of

H, KV, D, SLOTS = 4, 2, 5, 16


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, D, dtype=torch.float64)


def written(cache: Tensor, new: Tensor, starts: list[int], rows: list[int]) -> Tensor:
    """The cache with the new rows of each sequence, one assignment after another."""
    cache = cache.clone()
    for n, (start, row) in enumerate(zip(starts, rows, strict=True)):
        cache[row, start : start + new.shape[1]] = new[n]
    return cache


@given(st.data(), st.integers(0, 2**31))
def test_every_option(data: st.DataObject, seed: int) -> None:
    """Lengths that are one number or differ, left padding, rows of a larger cache, with and without new keys."""
    torch.manual_seed(seed)
    draw = data.draw
    s, new = draw(st.sampled_from((1, 2, 5))), draw(st.sampled_from((0, 1, 3)))
    found = draw(options(H, 3))
    found = {name: x.detach() if isinstance(x, Tensor) else x for name, x in found.items()}
    lengths = (
        [draw(st.integers(0, SLOTS - new))] * 3
        if draw(st.booleans())
        else draw(st.lists(st.integers(0, SLOTS - new), min_size=3, max_size=3))
    )
    row = draw(st.sampled_from(([0, 1, 2], [4, 0, 3])))
    pads = draw(st.sampled_from(([0, 0, 0], [2, 2, 2], [1, 0, 3])))
    pads = [min(pad, length) for pad, length in zip(pads, lengths, strict=True)]
    q, k, v = rows(3, s, H), rows(3, new, KV), rows(3, new, KV)
    k_cache, v_cache = rows(3 if row == [0, 1, 2] else 5, SLOTS, KV), rows(3 if row == [0, 1, 2] else 5, SLOTS, KV)
    expected_caches = [written(cache, x, lengths, row) for cache, x in ((k_cache, k), (v_cache, v))]
    arguments: dict[str, Any] = {"cache_seqlens": torch.tensor(lengths).int(), "return_softmax_lse": True, **found}
    if row != [0, 1, 2]:
        arguments["cache_batch_idx"] = torch.tensor(row).int()
    if any(pads):
        arguments["cache_leftpad"] = torch.tensor(pads).int()
    if new:
        arguments |= {"k": k, "v": v}
    result = flash_attn_with_kvcache(q, k_cache, v_cache, **arguments)
    for cache, expected in zip((k_cache, v_cache), expected_caches, strict=True):
        assert torch.equal(cache, expected)
    for n, length in enumerate(lengths):
        held = slice(pads[n], length + new)
        expected = reference(q[n], k_cache[row[n], held], v_cache[row[n], held], **rows_of(found, n))
        for ours, x in zip(result, expected, strict=True):
            torch.testing.assert_close(ours[n], x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("found", MASKED, ids=str)
@pytest.mark.parametrize("lengths", [[6, 6, 6], [0, 5, 11]], ids=str)
@pytest.mark.parametrize("s", [1, 3])
def test_a_stablemask_takes_its_positions_from_cache_seqlens(s: int, lengths: list[int], found: dict[str, Any]) -> None:
    """And counts them without the left padding; below, at and beyond N."""
    q, k, v, k_cache, v_cache = rows(3, s, H), rows(3, s, KV), rows(3, s, KV), rows(3, SLOTS, KV), rows(3, SLOTS, KV)
    gamma, sink = headwise_gamma(H).double(), torch.linspace(-1, 1, H, dtype=torch.float64)
    for pads in ([0, 0, 0], [0, 2, 1]):
        held = [pad + length for pad, length in zip(pads, lengths, strict=True)]
        out, lse = flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=torch.tensor(held), cache_leftpad=torch.tensor(pads), causal=True,
            return_softmax_lse=True, score_mod=stablemask(gamma, length=9, sink=sink), **found,
        )  # fmt: skip
        for n, length in enumerate(lengths):
            eq11 = {"gamma": gamma, "sink": sink, "length": 9, "positions": torch.arange(length, length + s)}
            keys, values = (x[n, pads[n] : held[n] + s] for x in (k_cache, v_cache))
            expected = reference(q[n], keys, values, causal=True, stablemask=eq11, **found)
            torch.testing.assert_close(out[n], expected[0], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(lse[n], expected[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [-1, 4])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_prompt_chunks_and_decode_steps_are_one_full_pass(as_tensor: bool, window: int, masked: bool) -> None:
    total = 14
    q, k, v = rows(2, total, H), rows(2, total, KV), rows(2, total, KV)
    found: dict[str, Any] = {"causal": True, "window_size": (window, 0)}
    if masked:
        found["score_mod"] = stablemask(headwise_gamma(H).double(), length=11)
    full = flash_attn_func(q, k, v, **found)
    k_cache, v_cache = torch.full((2, 2, SLOTS, KV, D), 99.0, dtype=torch.float64)
    parts, start = [], 0
    for size in (5, 3, 1, 1, 1, 3):
        part = slice(start, start + size)
        held = torch.full((2,), start).int() if as_tensor else start
        parts.append(flash_attn_with_kvcache(q[:, part], k_cache, v_cache, k[:, part], v[:, part], cache_seqlens=held, **found))
        start += size
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-10, atol=1e-10)
    assert torch.equal(k_cache[:, :total], k)
    assert torch.equal(v_cache[:, :total], v)
    assert (torch.stack([k_cache, v_cache])[:, :, total:] == 99).all()


def test_without_cache_seqlens_the_whole_cache_is_attended() -> None:
    q, k_cache, v_cache = rows(2, 3, H), rows(2, 7, KV), rows(2, 7, KV)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, causal=True)
    torch.testing.assert_close(out, flash_attn_func(q, k_cache, v_cache, causal=True))


def test_there_is_no_backward() -> None:
    q, cache, gamma = rows(1, 1, H), rows(1, 7, KV), headwise_gamma(H).requires_grad_()
    mask = stablemask(gamma, length=9)
    for arguments in ((q.clone().requires_grad_(), cache, cache), (q, cache, cache)):
        with pytest.raises(NotImplementedError, match="is for inference: call under"):
            flash_attn_with_kvcache(*arguments, causal=True, score_mod=mask)
        with torch.no_grad():
            assert not flash_attn_with_kvcache(*arguments, causal=True, score_mod=mask).requires_grad  # pyright: ignore


Q, CACHE, NEW = torch.randn(2, 1, H, D), torch.randn(2, 8, KV, D), torch.randn(2, 1, KV, D)
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "k alone": ({"k": NEW, "cache_seqlens": 3}, ValueError, "k and v must both be given or neither, got k alone"),
    "new without lengths": ({"k": NEW, "v": NEW}, ValueError, "cache_seqlens must be given with k and v"),
    "cache is full": ({"k": NEW, "v": NEW, "cache_seqlens": 8}, ValueError, "cache_seqlens must be from 0 to 7, .* got 8"),
    "a row is full": (
        {"k": NEW, "v": NEW, "cache_seqlens": torch.tensor([3, 8])},
        ValueError,
        r"cache_seqlens must be from 0 to 7, .* got tensor\(\[3, 8\]\)",
    ),
    "length below 0": ({"cache_seqlens": -1}, ValueError, "cache_seqlens must be from 0 to 8"),
    "float lengths": ({"cache_seqlens": torch.ones(2)}, TypeError, "cache_seqlens must be an int32 tensor, got torch.float32"),
    "a list": ({"cache_seqlens": [1, 2]}, TypeError, "cache_seqlens must be an integer tensor .* got list"),
    "lengths of 3": (
        {"cache_seqlens": torch.tensor([1, 2, 3])},
        ValueError,
        r"cache_seqlens must be \(B,\) = \(2,\), got \(3,\)",
    ),
    "elsewhere": ({"cache_seqlens": torch.ones(2, device="meta").int()}, ValueError, "cache_seqlens must be on the device of q"),
    "row of another cache": ({"cache_batch_idx": torch.tensor([0, 2])}, ValueError, r"rows of the cache, 0 to 1, got \[0, 2\]"),
    "a row twice": (
        {"cache_batch_idx": torch.tensor([1, 1]), "k": NEW, "v": NEW, "cache_seqlens": 3},
        ValueError,
        r"cache_batch_idx must be distinct where k and v are given, got \[1, 1\]",
    ),
    "pad below 0": ({"cache_leftpad": torch.tensor([0, -1])}, ValueError, r"cache_leftpad must be >= 0, got \[0, -1\]"),
    "batch": ({"q": torch.randn(3, 1, H, D)}, ValueError, "k_cache must have the batch size of q, 3, got 2"),
    "heads of k": ({"k": Q, "v": Q, "cache_seqlens": 3}, ValueError, r"k must have the heads of k_cache, \(2, 5\), got \(4, 5\)"),
    "heads of the sink": (
        {"learnable_sink": torch.zeros(3), "k": NEW, "v": NEW, "cache_seqlens": 3},
        ValueError,
        "sink must have one value for each of the 4 query heads, got 3",
    ),
    "inner": (
        {"score_mod": stablemask(0.5, length=9, score_mod=lambda s, b, h, i, j: s), "causal": True},
        NotImplementedError,
        "score_mod inside a StableMask is not taken with a cache",
    ),
    "no length": ({"score_mod": stablemask(0.5), "causal": True}, ValueError, r"length is required with a cache"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input(case: str) -> None:
    arguments, error, why = ERRORS[case]
    before = CACHE.clone()
    with pytest.raises(error, match=why):
        flash_attn_with_kvcache(**{"q": Q, "k_cache": CACHE, "v_cache": CACHE, **arguments})
    assert torch.equal(CACHE, before)
