"""scaled_dot_product_attention on a CPU: masks and their gradients, a static cache, dropout, autocast."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sm_flex import flex_attention, scaled_dot_product_attention, stablemask
from sm_flex.testing import assert_matches_eq11, oracle
from sm_flex.testing.gradients import outputs_and_gradients
from tests.helpers.problems import DTYPES, alibi, gamma_of, qkv


def sdpa(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, attn_mask: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    out = scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, enable_gqa=True, score_mod=stablemask(gamma, **kwargs))
    return out, None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("shape", [(13, 13), (1, 13), (6, 1, 13), (2, 1, 1, 13), (2, 6, 13, 13), (13,)])
def test_boolean_mask(dtype: torch.dtype, kernel: SDPBackend, shape: tuple[int, ...]):
    attn_mask = torch.rand(shape) > 0.4
    attn_mask[..., 0] = False  # row 0 is fully masked
    inputs = [*qkv(2, 6, 3, 13, 13, 8, dtype), gamma_of(6, dtype), attn_mask]
    with sdpa_kernel(kernel):
        assert_matches_eq11(sdpa, inputs, lambda m: {"visible": m, "length": 13})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(13, 13), (1, 13), (2, 1, 1, 13), (1, 6, 13, 13)])
def test_float_mask_gets_its_gradient(dtype: torch.dtype, shape: tuple[int, ...]):
    inputs = [*qkv(2, 6, 3, 13, 13, 8, dtype), gamma_of(6, dtype), torch.randn(shape).to(dtype)]
    assert_matches_eq11(sdpa, inputs, lambda bias: {"bias": bias, "length": 13})


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_float_mask_with_infinities_and_without_mass(kernel: SDPBackend):
    """A fully masked row whose log M is -inf as well: output 0 and gradients 0, not NaN."""
    bias = torch.zeros(9, 9, dtype=torch.float64)
    bias[[0, 4, 8]] = -math.inf
    gamma = torch.tensor([0.5, math.inf]).double()
    grad_out = torch.randn(1, 2, 9, 8, dtype=torch.float64)
    inputs = qkv(1, 2, 2, 9, 9, 8)
    with sdpa_kernel(kernel):
        actual = outputs_and_gradients(lambda q, k, v: sdpa(q, k, v, gamma, bias, length=9), inputs, grad_out, None)
    reference = outputs_and_gradients(lambda q, k, v: (oracle(q, k, v, gamma=gamma, bias=bias)[0], None), inputs, grad_out, None)
    assert actual[0][0, 1, 4].abs().max() == 0
    for a, b in zip(actual, reference, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_static_cache_with_unused_slots(kernel: SDPBackend):
    """5 queries at positions 6..10 of a cache of 32 slots: the mask says which slots are used, positions feed the mass."""
    q, k, v = qkv(2, 4, 2, 5, 32, 8)
    positions = torch.arange(6, 11)
    attn_mask = torch.arange(32) <= positions.unsqueeze(1)
    gamma = gamma_of(4, torch.float64)
    with sdpa_kernel(kernel):
        out = sdpa(q, k, v, gamma, attn_mask, length=16, positions=positions)[0]
    reference, _ = oracle(q, k[:, :, :11], v[:, :, :11], gamma=gamma, length=16, positions=positions)
    torch.testing.assert_close(out, reference)


def test_causal_flag_and_scale_and_value_dim():
    """A value dim of its own (dense), a scale, and a non-contiguous layout."""
    q, k, v = qkv(2, 4, 2, 13, 13, 8, v_dim=5)
    for scale in (0.7, -0.3):
        out = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True, score_mod=stablemask(0.3, length=20)
        )
        torch.testing.assert_close(out, oracle(q, k, v, gamma=0.3, length=20, scale=scale)[0])
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).mT.contiguous().mT for x in qkv(2, 4, 4, 13, 13, 8))
    assert q.stride(-1) != 1
    out = scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=stablemask(0.3))
    torch.testing.assert_close(out, oracle(q, k, v, gamma=0.3)[0])


def test_dropout_drops_attention_and_never_the_mass():
    """With values 1 the output is the row's undropped share on average; the mass takes its part whatever is dropped."""
    q, k, _ = qkv(1, 64, 64, 33, 33, 8, torch.float32)
    v = torch.ones(1, 64, 33, 4)
    mask = stablemask(0.05, length=64)
    out = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.5, score_mod=mask)
    share = scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=mask)
    assert not torch.equal(out, share)
    torch.testing.assert_close(out.mean(1), share.mean(1), atol=0.2, rtol=0)
    # Row 0 has one real score: it is dropped, or doubled.
    ratio = (out / share)[0, :, 0, 0]
    assert torch.all((ratio.abs() < 1e-6) | ((ratio - 2).abs() < 1e-5))
    assert 0 < (ratio < 1).sum() < 64


def test_dropout_gradient_uses_the_same_draw(monkeypatch: pytest.MonkeyPatch):
    """Blocks computed again in the backward must drop what they dropped."""
    import sm_flex.engines.dense as dense

    monkeypatch.setattr(dense, "BLOCK_SCORES", 1)
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 2, 70, 70, 4))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.3, score_mod=stablemask(0.1))
    (dv,) = torch.autograd.grad(out.sum(), v)
    # out is linear in v: <out, 1> = <dv, v> for the same draw.
    torch.testing.assert_close((dv * v).sum(), out.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_as_sdpa(dtype: torch.dtype):
    q, k, v = qkv(2, 4, 4, 13, 13, 8, torch.float32)
    mask = torch.zeros(13, 13)
    with torch.autocast("cpu", dtype):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).dtype
        out = flex_attention(q, k, v, score_mod=stablemask(0.3))
        assert isinstance(out, Tensor)
        masked = scaled_dot_product_attention(q, k, v, attn_mask=mask, score_mod=stablemask(0.3))
        dense = flex_attention(q, k, v, score_mod=stablemask(0.3, score_mod=alibi))
        assert isinstance(dense, Tensor)
        mixed = flex_attention(q, k.to(dtype), v, score_mod=stablemask(0.3))
        assert isinstance(mixed, Tensor)
        wide = flex_attention(q.double(), k.double(), v.double(), score_mod=stablemask(0.3))
        assert isinstance(wide, Tensor)
    assert out.dtype == masked.dtype == dense.dtype == expected == dtype
    assert wide.dtype == torch.float64
    direct = flex_attention(q.to(dtype), k.to(dtype), v.to(dtype), score_mod=stablemask(0.3))
    assert isinstance(direct, Tensor)
    assert torch.equal(out, direct)
    assert torch.equal(mixed, direct)
