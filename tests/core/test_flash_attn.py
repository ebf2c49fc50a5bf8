"""flash-attn's functions on a CPU against its documented semantics in float64, and against eq. 11 with a StableMask."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sm_flex.flash_attn as flash_attn
from sm_flex import flex_attention, headwise_gamma, stablemask
from sm_flex.testing import assert_within_error_budget, check_attention
from tests.helpers.flash_attn import MASKED, options, reference, rows_of
from tests.helpers.watching import Largest

# Each is a list of the two lengths of one sequence, queries and keys.
LENGTHS = st.tuples(st.sampled_from((1, 2, 3, 5, 8, 13)), st.sampled_from((1, 2, 3, 5, 8, 13, 0)))
HEADS = st.sampled_from(((2, 2), (4, 2), (3, 1)))


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_same(ours: Tensor, expected: Tensor, inputs: list[Any], tolerance: float = 1e-10) -> None:
    """The outputs and the gradients of all inputs that have one."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)
    learned = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    grad = torch.randn_like(ours)
    pairs = [torch.autograd.grad(x, learned, grad, allow_unused=True, materialize_grads=True) for x in (ours, expected)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@given(st.data(), st.integers(0, 2**31))
def test_flash_attn_func(data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    (heads, kv_heads), (s, t) = data.draw(HEADS), data.draw(LENGTHS)
    found = data.draw(options(heads, 2))
    q, k, v = leaf(2, s, heads, 5), leaf(2, t, kv_heads, 5), leaf(2, t, kv_heads, 5)
    ours = flash_attn.flash_attn_func(q, k, v, **found)
    expected = torch.stack([reference(q[n], k[n], v[n], **rows_of(found, n))[0] for n in range(2)])
    assert_same(ours, expected, [q, k, v, found.get("learnable_sink")])


@given(st.data(), st.integers(0, 2**31))
def test_flash_attn_varlen_func(data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    (heads, kv_heads), lengths = data.draw(HEADS), data.draw(st.lists(LENGTHS, min_size=1, max_size=4))
    if data.draw(st.booleans()):
        lengths = [(s, s) for s, _ in lengths]
    found = data.draw(options(heads, len(lengths)))
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in zip(*lengths, strict=True))
    q, k, v = leaf(int(cu_q[-1]), heads, 5), leaf(int(cu_k[-1]), kv_heads, 5), leaf(int(cu_k[-1]), kv_heads, 5)
    ours = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 13, 13, **found)
    documents = zip(q.split(cu_q.diff().tolist()), *(x.split(cu_k.diff().tolist()) for x in (k, v)), strict=True)
    expected = torch.cat([reference(*x, **rows_of(found, n))[0] for n, x in enumerate(documents)])
    assert_same(ours, expected, [q, k, v, found.get("learnable_sink")])


@pytest.mark.parametrize(
    ("s", "t", "mask"),
    [
        (2, 5, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
        (5, 2, [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]),
    ],
)
def test_the_causal_masks_of_flash_attns_docstring(s: int, t: int, mask: list[list[int]]) -> None:
    """With scores of 0 and unit vectors for values, out is the mask over the number of keys that a row sees."""
    q, k = torch.zeros(1, s, 1, 4), torch.zeros(1, t, 1, 4)
    v = torch.eye(t)[None, :, None]
    seen = torch.tensor(mask, dtype=torch.float32)
    out = flash_attn.flash_attn_func(q, k, v, causal=True)[0, :, 0]
    torch.testing.assert_close(out, seen / seen.sum(-1, keepdim=True).clamp(min=1))


def test_a_window_over_many_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the plain PyTorch of softcap in blocks of rows, whose gradients are those of one block."""
    import sm_flex.engines.dense as dense
    import sm_flex.engines.varlen_cpu as varlen_cpu

    monkeypatch.setattr(varlen_cpu, "BLOCK", 16)
    monkeypatch.setattr(dense, "BLOCK_SCORES", 1000)
    q, k, v = leaf(1, 70, 2, 5), leaf(1, 75, 1, 5), leaf(1, 75, 1, 5)
    slopes = torch.rand(2)
    cases: list[dict[str, Any]] = [
        {"window_size": (7, 3)},
        {"window_size": (-1, 9)},
        {"window_size": (20, -1)},
        {"window_size": (7, 3), "softcap": 2.0, "alibi_slopes": slopes},
        {"causal": True, "softcap": 2.0, "alibi_slopes": slopes},
    ]
    for found in cases:
        ours = flash_attn.flash_attn_func(q, k, v, **found)
        assert_same(ours, reference(q[0], k[0], v[0], **found)[0][None], [q, k, v])


@pytest.mark.parametrize("found", [{}, {"causal": True}, {"window_size": (3, 2)}, {"causal": True, "softcap": 4.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, found: dict[str, Any]) -> None:
    q, k, v = (torch.randn(37, heads, 16).to(dtype).requires_grad_() for heads in (4, 2, 2))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    outs = [flash_attn.flash_attn_func(q[None], k[None], v[None], **found)[0]]
    outs += [reference(*x, **found)[0] for x in (wide, (q, k, v))]
    grad = torch.randn(37, 4, 16).to(dtype)
    for ours, expected, plain in zip(
        *(
            [out, *torch.autograd.grad(out, x, grad.to(out.dtype))]
            for out, x in zip(outs, ((q, k, v), wide, (q, k, v)), strict=True)
        ),
        strict=True,
    ):
        assert_within_error_budget(ours, expected, plain)


def test_packed_forms_are_the_tensors_that_they_hold() -> None:
    qkv, kv, q = torch.randn(2, 7, 3, 2, 5), torch.randn(2, 9, 2, 2, 5), torch.randn(2, 7, 4, 5)
    cu, cu_k = torch.tensor([0, 3, 7]).int(), torch.tensor([0, 4, 9]).int()
    mask = stablemask(0.3, length=20)
    cases: list[dict[str, Any]] = [{"causal": True, "window_size": (2, 0), "score_mod": mask}, {"softcap": 3.0}]
    three: Any = (qkv.unbind(2), (*qkv[0].unbind(1), cu, cu, 4, 4))
    two: Any = ((q, *kv.unbind(2)), (q[0], *kv[0].unbind(1), cu, cu_k, 4, 5))
    for found in cases:
        pairs = (
            (flash_attn.flash_attn_qkvpacked_func(qkv, **found), flash_attn.flash_attn_func(*three[0], **found)),
            (flash_attn.flash_attn_kvpacked_func(q, kv, **found), flash_attn.flash_attn_func(*two[0], **found)),
            (
                flash_attn.flash_attn_varlen_qkvpacked_func(qkv[0], cu, 4, **found),
                flash_attn.flash_attn_varlen_func(*three[1], **found),
            ),
            (
                flash_attn.flash_attn_varlen_kvpacked_func(q[0], kv[0], cu, cu_k, 4, 5, **found),
                flash_attn.flash_attn_varlen_func(*two[1], **found),
            ),
        )
        for ours, expected in pairs:
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("found", [{}, {"causal": True}, {"window_size": (3, 1)}, {"causal": True, "score_mod": 0.3}], ids=str)
def test_dropout_drops_weights_and_scales_the_others(found: dict[str, Any]) -> None:
    """With unit vectors for values out is the weights: each 0, or that without dropout over 1 - p; in a document too."""
    if "score_mod" in found:
        found = {**found, "score_mod": stablemask(found["score_mod"], length=20)}
    q, k, v = torch.randn(1, 16, 2, 16), torch.randn(1, 16, 1, 16), torch.eye(16)[None, :, None]
    cu = torch.tensor([0, 16]).int()
    calls: list[Callable[..., Tensor]] = [
        lambda p: flash_attn.flash_attn_func(q, k, v, p, **found)[0],
        lambda p: flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 16, 16, p, **found),
    ]
    for call in calls:
        weights, dropped = call(0.0), call(0.25)
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], weights[kept] / 0.75)
        assert 0.1 < (~kept)[weights > 0].float().mean() < 0.4


@pytest.mark.parametrize("found", MASKED, ids=str)
@pytest.mark.parametrize(("s", "t"), [(11, 11), (4, 11), (1, 9), (11, 4)])
def test_causal_with_a_stablemask_is_equation_11(s: int, t: int, found: dict[str, Any]) -> None:
    """A query's position is its slot. Gamma and the sink are learned."""
    q, k, v = leaf(2, s, 4, 5), leaf(2, t, 2, 5), leaf(2, t, 2, 5)
    gamma, sink = headwise_gamma(4).double().requires_grad_(), leaf(4)
    mask = stablemask(gamma, length=10, sink=sink)
    ours = flash_attn.flash_attn_func(q, k, v, causal=True, score_mod=mask, **found)
    positions = (torch.arange(s) + t - s).clamp(min=0)
    eq11 = {"gamma": gamma, "sink": sink, "length": 10, "positions": positions}
    expected = [reference(q[n], k[n], v[n], causal=True, stablemask=eq11, **found)[0] for n in range(2)]
    assert_same(ours, torch.stack(expected), [q, k, v, gamma, sink])


@pytest.mark.parametrize("found", MASKED, ids=str)
@pytest.mark.parametrize("lengths", [[(3, 3), (5, 5), (0, 0), (1, 1)], [(2, 7), (5, 3), (1, 1), (3, 40)]], ids=str)
def test_documents_with_a_stablemask_are_equation_11(lengths: list[tuple[int, int]], found: dict[str, Any]) -> None:
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in zip(*lengths, strict=True))
    q, k, v = leaf(int(cu_q[-1]), 4, 5), leaf(int(cu_k[-1]), 2, 5), leaf(int(cu_k[-1]), 2, 5)
    gamma = headwise_gamma(4).double().requires_grad_()
    mask = stablemask(gamma, length=12)
    ours = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 40, causal=True, score_mod=mask, **found)
    documents = zip(q.split(cu_q.diff().tolist()), *(x.split(cu_k.diff().tolist()) for x in (k, v)), strict=True)
    expected = []
    for document in documents:
        s, t = len(document[0]), len(document[1])
        positions = (torch.arange(s) + t - s).clamp(min=0)
        eq11 = {"gamma": gamma, "length": 12, "positions": positions}
        expected.append(reference(*document, causal=True, stablemask=eq11, **found)[0])
    assert_same(ours, torch.cat(expected), [q, k, v, gamma])


@pytest.mark.parametrize("window", [-1, 3])
def test_positions_tables_and_an_inner_score_mod_go_through(window: int) -> None:
    """A StableMask's own positions (B, S), a sink for each row of each sequence, and ALiBi as its score_mod."""
    q, k, v = leaf(2, 7, 4, 5), leaf(2, 7, 2, 5), leaf(2, 7, 2, 5)
    positions, sink = torch.stack([torch.arange(7), torch.arange(3, 10)]), leaf(2, 4, 7)
    slopes = torch.tensor([0.3, 0.1, 0.0, 0.5], dtype=torch.float64)
    common: dict[str, Any] = {"causal": True, "window_size": (window, 0)}
    for alibi in (False, True):
        inner = (lambda score, b, h, i, j: score - slopes[h] * (i - j)) if alibi else None
        mask = stablemask(0.2, length=9, positions=positions, sink=sink, score_mod=inner)
        ours = flash_attn.flash_attn_func(q, k, v, score_mod=mask, **common)
        eq11 = [{"gamma": 0.2, "length": 9, "positions": positions[n], "sink": sink[n : n + 1]} for n in range(2)]
        extra: dict[str, Any] = {"alibi_slopes": slopes} if alibi else {}
        expected = [reference(q[n], k[n], v[n], stablemask=eq11[n], **common, **extra)[0] for n in range(2)]
        assert_same(ours, torch.stack(expected), [q, k, v, sink])


def test_causal_leaves_a_window_no_right_side_with_a_stablemask_either() -> None:
    q, mask = torch.randn(2, 7, 2, 5), stablemask(0.2, length=9)
    ours, left = (flash_attn.flash_attn_func(q, q, q, causal=True, window_size=(3, n), score_mod=mask) for n in (2, 0))
    torch.testing.assert_close(ours, left)


def test_without_a_length_n_is_that_of_the_call() -> None:
    q = torch.randn(2, 7, 2, 5)
    for window in (-1, 3):
        ours, fixed = (
            flash_attn.flash_attn_func(q, q, q, causal=True, window_size=(window, 0), score_mod=stablemask(0.2, length=n))
            for n in (None, 7)
        )
        assert torch.equal(ours, fixed)
    x = q.transpose(1, 2)
    out = flex_attention(x, x, x, score_mod=stablemask(0.2, length=7))
    assert isinstance(out, Tensor)
    torch.testing.assert_close(flash_attn.flash_attn_func(q, q, q, causal=True, score_mod=stablemask(0.2)), out.transpose(1, 2))


def test_every_law_of_stablemask() -> None:
    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        gamma: Tensor,
        visible: Any,
        scale: Any,
        sink: Any = None,
        sink_value: Any = None,
        **options: Any,
    ) -> Tensor:
        if visible is not None:
            raise NotImplementedError("masks are not flash-attn's")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = stablemask(gamma, sink=sink, sink_value=sink_value, **options)
        return flash_attn.flash_attn_func(q, k, v, softmax_scale=scale, causal=True, score_mod=mask).transpose(1, 2)

    report = check_attention(attention, max_examples=4)
    no_lse, masked = {"log_sum_exp", "gradient_of_lse"}, {"masks", "packed_is_one_by_one", "padding_changes_nothing"}
    assert set(report.not_run) == no_lse | masked


@pytest.mark.parametrize(
    "found",
    [
        {"window_size": (100, 30)},
        {"causal": True, "score_mod": stablemask(0.01, length=4096)},
        {"causal": True, "window_size": (100, 0), "score_mod": stablemask(0.01, length=4096)},
        {"softcap": 2.0, "alibi_slopes": torch.ones(1)},
    ],
    ids=["window", "StableMask", "StableMask, window", "alibi and softcap"],
)
def test_no_tensor_has_an_element_for_each_query_and_key(found: dict[str, Any]) -> None:
    q, k = torch.randn(1, 2000, 1, 4, requires_grad=True), torch.randn(1, 2200, 1, 4)
    cu_q, cu_k = torch.tensor([0, 2000]).int(), torch.tensor([0, 2200]).int()
    calls: list[Callable[[], Any]] = [
        lambda: flash_attn.flash_attn_func(q, k, k, **found).sum().backward(),
        lambda: flash_attn.flash_attn_varlen_func(q[0], k[0], k[0], cu_q, cu_k, 2000, 2200, **found).sum().backward(),
        lambda: flash_attn.flash_attn_with_kvcache(q.detach(), k, k, cache_seqlens=2100, **found),
    ]
    for call in calls:
        with Largest() as largest:
            call()
        assert 2000 * 4 <= largest.elements < 2000 * 2200 // 4


def test_gamma_inf_is_flash_attn_itself() -> None:
    q, k, v = torch.randn(2, 7, 4, 5), torch.randn(2, 9, 2, 5), torch.randn(2, 9, 2, 5)
    cases: list[dict[str, Any]] = [{}, {"window_size": (3, 0)}, {"softcap": 1.0}]
    for found in cases:
        plain = flash_attn.flash_attn_func(q, k, v, causal=True, **found)
        ours = flash_attn.flash_attn_func(q, k, v, causal=True, score_mod=stablemask(math.inf, length=9), **found)
        torch.testing.assert_close(ours, plain)
