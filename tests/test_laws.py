"""The laws of StableMask, on requests that hypothesis draws: dimensions, rates and a seed."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import check
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention
from torch.nn.attention.varlen import AuxRequest as VarlenAux

from sm_flex import flex_attention, headwise_gamma, log_mass, scaled_dot_product_attention, stablemask, varlen_attn
from sm_flex.testing import oracle
from sm_flex.testing.strategies import Request, requests

BACKENDS = st.sampled_from(("FLASH_ATTENTION", "MATH"))
EXACT = {"rtol": 0, "atol": 1e-10}


def attend(request: Request, backend: str = "AUTO", **changes) -> tuple[Tensor, Tensor]:
    """(out', lse') of the request, with q, k, v or keywords of stablemask changed."""
    q, k, v = (changes.pop(name, request.tensors[name]) for name in "qkv")
    mask = {"gamma": request.gamma, "length": request.length, "positions": request.positions, **changes}
    out, aux = flex_attention(
        q, k, v, score_mod=stablemask(mask.pop("gamma"), **mask), enable_gqa=True,
        kernel_options={"BACKEND": backend}, return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    assert aux.lse is not None
    return out, aux.lse


@given(requests(), BACKENDS)
def test_is_equation_11(request: Request, backend: str):
    out, lse = attend(request, backend)
    expected, expected_lse = oracle(*request.qkv, **request.kwargs)
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(lse, expected_lse, **EXACT)


@given(requests(learnable=True), BACKENDS, st.booleans())
def test_gradients_are_those_of_equation_11(request: Request, backend: str, with_lse_grad: bool):
    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor):
        return attend(dataclasses.replace(request, gamma=gamma), backend, q=q, k=k, v=v)

    kwargs = {"length": request.length, "positions": request.positions}
    assert isinstance(request.gamma, Tensor)
    check(run, [*request.qkv, request.gamma], lambda: kwargs, with_lse_grad=with_lse_grad)


@given(requests(), st.sampled_from((torch.float32, torch.bfloat16, torch.float16)), BACKENDS)
def test_low_precision_within_budget(request: Request, dtype: torch.dtype, backend: str):
    from sm_flex.testing import assert_as_good_as

    low = [x.to(dtype) for x in request.qkv]
    out, lse = attend(request, backend, **dict(zip("qkv", low, strict=True)))
    reference, reference_lse = oracle(*low, **request.kwargs)
    plain, _ = oracle(*low, **request.kwargs, dtype=dtype)
    assert_as_good_as(out, reference, plain, lse=reference_lse)
    torch.testing.assert_close(lse.double(), reference_lse, rtol=2e-5, atol=2e-4)


@given(requests(), BACKENDS)
def test_rows_sum_to_the_real_share(request: Request, backend: str):
    """With values 1 the output is s = sigmoid(l - log M) of the causal log-sum-exp l, in [0, 1]."""
    ones = torch.ones_like(request.tensors["v"])
    share, _ = attend(request, backend, v=ones)
    _, causal_lse = attend(request, backend, gamma=math.inf)
    positions = torch.arange(request.num_queries) if request.positions is None else request.positions
    gamma = torch.as_tensor(request.gamma, dtype=torch.float64)
    expected = torch.sigmoid(causal_lse - log_mass(gamma, positions, request.length))
    torch.testing.assert_close(share[..., 0], expected, **EXACT)
    assert share.min() >= 0
    assert share.max() <= 1 + 1e-12


@given(requests(square=True), BACKENDS)
def test_identical_tokens_tell_their_position(request: Request, backend: str):
    """Section 4.2: l - log M strictly increases up to row N-1, where it is infinite; alpha never decreases."""
    rows = request.num_queries
    q, k = (request.tensors[name][:, :, :1].expand(-1, -1, rows, -1) for name in "qk")
    ones = torch.ones_like(request.tensors["v"])
    gamma = torch.as_tensor(request.gamma, dtype=torch.float64)
    alpha, _ = attend(request, backend, q=q, k=k, v=ones)
    _, causal_lse = attend(request, backend, q=q, k=k, gamma=math.inf)
    within = slice(0, min(rows, request.length))
    assert (alpha[:, :, within, 0].diff(dim=-1) >= -1e-12).all()
    odds = (causal_lse - log_mass(gamma, torch.arange(rows), request.length))[..., : min(rows, request.length - 1)]
    odds = odds[torch.isfinite(odds).all(-1)]
    assert (odds.diff(dim=-1) > 0).all()


@given(requests(), BACKENDS, st.data())
def test_no_row_sees_the_future(request: Request, backend: str, data: st.DataObject):
    """A changed key and value leaves every row before it bit-equal, and changes the rows from it on."""
    changed = data.draw(st.integers(0, request.num_keys - 1))
    k, v = (request.tensors[name].clone() for name in "kv")
    k[:, :, changed:] += 1.0
    v[:, :, changed:] += 3.0
    before, before_lse = attend(request, backend)
    after, after_lse = attend(request, backend, k=k, v=v)
    first = max(changed - (request.num_keys - request.num_queries), 0)  # the first query that sees slot `changed`
    assert torch.equal(before[:, :, :first], after[:, :, :first])
    assert torch.equal(before_lse[:, :, :first], after_lse[:, :, :first])
    if (attend(request, backend, v=torch.ones_like(v))[0][:, :, first:] > 1e-6).any():
        assert not torch.equal(before[:, :, first:], after[:, :, first:])


@given(requests(square=True), BACKENDS, st.data())
def test_a_prefix_of_the_sequence_is_a_prefix_of_the_output(request: Request, backend: str, data: st.DataObject):
    end = data.draw(st.integers(1, request.num_keys))
    whole = attend(request, backend)
    part = attend(request, backend, **{name: request.tensors[name][:, :, :end] for name in "qkv"})
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[:, :, :end], b, **EXACT)


@given(requests(square=True), BACKENDS, st.data())
def test_cached_steps_are_the_full_pass(request: Request, backend: str, data: st.DataObject):
    """Chunked prefill and decode steps of any size, below, at and beyond the training length."""
    whole = attend(request, backend)
    start = 0
    while start < request.num_keys:
        end = data.draw(st.integers(start + 1, request.num_keys))
        q, k, v = request.qkv
        step = attend(
            request, backend, q=q[:, :, start:end], k=k[:, :, :end], v=v[:, :, :end], positions=torch.arange(start, end)
        )
        for a, b in zip(whole, step, strict=True):
            torch.testing.assert_close(a[:, :, start:end], b, **EXACT)
        start = end


@given(requests(square=True), st.data())
def test_left_padding_and_rolled_caches_change_nothing(request: Request, data: st.DataObject):
    """Padding slots before the sequence, or unused slots after it, hidden by attn_mask; positions start at the real row."""
    pad, unused = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    rows = request.num_keys
    q, k, v = (torch.nn.functional.pad(x, (0, 0, pad, unused), value=7.0) for x in request.qkv)
    slots = torch.arange(pad + rows + unused)
    used = (slots >= pad) & (slots < pad + rows)
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=used.unsqueeze(0), enable_gqa=True,
        score_mod=stablemask(request.gamma, length=request.length, positions=(slots - pad).clamp(min=0)),
    )  # fmt: skip
    torch.testing.assert_close(out[:, :, pad : pad + rows], attend(request)[0], **EXACT)


@given(requests(square=True), st.data())
def test_packed_is_one_by_one(request: Request, data: st.DataObject):
    """varlen_attn on the batch's sequences laid one after another, cut at random; positions restart."""
    total = request.batch * request.num_keys
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=4))})
    cu = torch.tensor(cuts, dtype=torch.int32)
    q, k, v = (x.transpose(1, 2).reshape(total, -1, request.head_dim) for x in request.qkv)
    longest = max(b - a for a, b in pairwise(cuts))
    out, lse = varlen_attn(
        q, k, v, cu, cu, longest, longest, window_size=(-1, 0), enable_gqa=True, return_aux=VarlenAux(lse=True),
        score_mod=stablemask(request.gamma, length=request.length),
    )  # fmt: skip
    for a, b in pairwise(cuts):
        alone = (x[a:b].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        expected, expected_lse = oracle(*alone, gamma=request.gamma, length=request.length)
        torch.testing.assert_close(out[a:b].transpose(0, 1).unsqueeze(0), expected, **EXACT)
        torch.testing.assert_close(lse[:, a:b].unsqueeze(0), expected_lse, **EXACT)


@given(requests(), BACKENDS)
def test_grouped_heads_are_repeated_heads(request: Request, backend: str):
    groups = request.heads // request.kv_heads
    k, v = (request.tensors[name].repeat_interleave(groups, dim=1) for name in "kv")
    for a, b in zip(attend(request, backend), attend(request, backend, k=k, v=v), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@given(requests(square=True), BACKENDS)
def test_infinite_gamma_is_causal_attention(request: Request, backend: str):
    q, k, v = request.qkv
    causal = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend(request, backend, gamma=math.inf)[0], causal, **EXACT)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@given(requests(square=True))
def test_lse_is_that_of_torchs_flex_over_presoftmax(request: Request):
    """l' is the log-sum-exp of the whole row of A_SM, as torch's own flex_attention computes it from eq. 8."""
    q, k, v = request.qkv
    gamma = torch.as_tensor(request.gamma, dtype=torch.float64).clamp(max=1e4)  # 0 * inf is NaN in eq. 8 as printed
    mask = stablemask(gamma)
    _, aux = torch_flex_attention(q, k, v, score_mod=mask.presoftmax, enable_gqa=True, return_aux=AuxRequest(lse=True))
    assert aux.lse is not None
    _, lse = attend(request, gamma=gamma, length=None)
    # torch's eager flex keeps lse in float32 terms of log 2.
    torch.testing.assert_close(lse, aux.lse.double(), rtol=1e-5, atol=1e-5)


@given(requests(), BACKENDS, st.data())
def test_batch_and_heads_are_independent(request: Request, backend: str, data: st.DataObject):
    """Permuting the batch, or whole groups of heads with their rates, permutes the output."""
    out, lse = attend(request, backend)
    order = torch.tensor(data.draw(st.permutations(range(request.batch))))
    permuted = attend(request, backend, **{name: request.tensors[name][order] for name in "qkv"})
    torch.testing.assert_close(permuted[0], out[order], **EXACT)
    kv_order = torch.tensor(data.draw(st.permutations(range(request.kv_heads))))
    groups = request.heads // request.kv_heads
    heads = (kv_order.unsqueeze(1) * groups + torch.arange(groups)).flatten()
    gamma = request.gamma[heads] if isinstance(request.gamma, Tensor) else request.gamma
    changes = {
        "q": request.tensors["q"][:, heads],
        "k": request.tensors["k"][:, kv_order],
        "v": request.tensors["v"][:, kv_order],
    }
    permuted = attend(request, backend, **changes, gamma=gamma)
    torch.testing.assert_close(permuted[0], out[:, heads], **EXACT)
    torch.testing.assert_close(permuted[1], lse[:, heads], **EXACT)


@given(requests(), BACKENDS)
def test_linear_in_v(request: Request, backend: str):
    v, w = request.tensors["v"], torch.randn_like(request.tensors["v"])
    both = attend(request, backend, v=2 * v - 3 * w)[0]
    torch.testing.assert_close(both, 2 * attend(request, backend)[0] - 3 * attend(request, backend, v=w)[0], rtol=0, atol=1e-9)


@given(st.integers(1, 70))
def test_headwise_rates_are_distinct_and_below_one(heads: int):
    gamma = headwise_gamma(heads)
    assert gamma.shape == (heads,)
    assert len(set(gamma.tolist())) == heads
    assert (gamma > 0).all()
    assert (gamma < 1).all()
