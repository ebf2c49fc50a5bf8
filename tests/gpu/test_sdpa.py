"""scaled_dot_product_attention on the CUDA engines: masks, their gradients, dropout, autocast, and who is chosen."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sm_flex import flex_attention, scaled_dot_product_attention, stablemask
from sm_flex.testing import assert_matches_eq11, oracle
from sm_flex.testing.gradients import outputs_and_gradients
from tests.helpers.gpu import DEVICE
from tests.helpers.problems import gamma_of, qkv
from tests.helpers.watching import Operations, engines_used

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_tile")]


def sdpa(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, attn_mask: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    mask = stablemask(gamma, **kwargs)
    return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, enable_gqa=q.shape[1] != k.shape[1], score_mod=mask), None


# Kernel, the engine it is here, the dtype, key heads: torch's own choice gives the memory-efficient kernel no grouped heads.
MASKED = [
    (SDPBackend.EFFICIENT_ATTENTION, "efficient", torch.bfloat16, 6),
    (SDPBackend.EFFICIENT_ATTENTION, "efficient", torch.float32, 6),
    (SDPBackend.CUDNN_ATTENTION, "cudnn", torch.bfloat16, 6),
    (SDPBackend.MATH, None, torch.bfloat16, 2),
    (SDPBackend.MATH, None, torch.float32, 2),
]


@pytest.mark.parametrize(("kernel", "engine", "dtype", "kv_heads"), MASKED)
@pytest.mark.parametrize("shape", [(37, 37), (1, 37), (6, 1, 37), (2, 1, 1, 37), (2, 6, 37, 37), (37,)])
def test_boolean_mask(
    kernel: SDPBackend,
    engine: str | None,
    dtype: torch.dtype,
    kv_heads: int,
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
):
    attn_mask = torch.rand(shape) > 0.4
    attn_mask[..., 0] = False  # row 0 is fully masked
    inputs = [*qkv(2, 6, kv_heads, 37, 37, 64, dtype, DEVICE), gamma_of(6, dtype, DEVICE), attn_mask.to(DEVICE)]
    with sdpa_kernel(kernel), engines_used(monkeypatch) as used:
        assert_matches_eq11(sdpa, inputs, lambda m: {"visible": m, "length": 37})
        assert used == ([] if engine is None else [engine])
        # Not learned: the kernel works log M out by itself.
        q, k, v, gamma, attn_mask = inputs
        fast, _ = sdpa(q, k, v, gamma, attn_mask)
    assert fast[:, :, 0].abs().max() == 0
    reference, _ = oracle(q, k, v, gamma=gamma, visible=attn_mask)
    torch.testing.assert_close(fast.double(), reference, atol=2**-6, rtol=2**-6)


@pytest.mark.parametrize("kernel", [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(37, 37), (1, 37), (2, 1, 1, 37), (1, 6, 37, 37)])
def test_float_mask_gets_its_gradient(kernel: SDPBackend, dtype: torch.dtype, shape: tuple[int, ...]):
    inputs = [*qkv(2, 6, 6, 37, 37, 64, dtype, DEVICE), gamma_of(6, dtype, DEVICE), torch.randn(shape).to(DEVICE, dtype)]
    with sdpa_kernel(kernel):
        assert_matches_eq11(sdpa, inputs, lambda bias: {"bias": bias, "length": 37})


def test_float_mask_gets_its_gradient_on_the_automatic_engine():
    """cuDNN gives a mask no gradient, so whatever torch prefers, it must not be cuDNN."""
    bias = torch.randn(37, 37).to(DEVICE, torch.bfloat16)
    inputs = [*qkv(2, 6, 2, 37, 37, 64, torch.bfloat16, DEVICE), gamma_of(6, torch.bfloat16, DEVICE), bias]
    assert_matches_eq11(sdpa, inputs, lambda bias: {"bias": bias, "length": 37})


@pytest.mark.parametrize("kernel", [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
def test_float_mask_with_infinities_and_without_mass(kernel: SDPBackend):
    """A fully masked row whose log M is -inf as well: output 0 and gradients 0, not NaN."""
    bias = torch.zeros(41, 41, device=DEVICE)
    bias[[0, 4, 40]] = -math.inf
    gamma = torch.tensor([0.5, math.inf], device=DEVICE)
    inputs = qkv(1, 2, 2, 41, 41, 64, torch.float32, DEVICE)
    grad_out = torch.randn(1, 2, 41, 64, device=DEVICE)
    with sdpa_kernel(kernel):
        actual = outputs_and_gradients(lambda q, k, v: sdpa(q, k, v, gamma, bias, length=41), inputs, grad_out, None)
    reference = outputs_and_gradients(lambda q, k, v: (oracle(q, k, v, gamma=gamma, bias=bias)[0], None), inputs, grad_out, None)
    assert actual[0][0, 1, 4].abs().max() == 0
    for a, b in zip(actual, reference, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kernel", "engine", "dtype", "kv_heads"), MASKED)
def test_static_cache_with_unused_slots(
    kernel: SDPBackend, engine: str | None, dtype: torch.dtype, kv_heads: int, monkeypatch: pytest.MonkeyPatch
):
    """5 queries at positions 41..45 of a cache of 64 slots: the mask says which slots are used, positions feed the mass."""
    positions = torch.arange(41, 46, device=DEVICE)
    attn_mask = torch.arange(64, device=DEVICE) <= positions.unsqueeze(1)
    inputs = [*qkv(2, 6, kv_heads, 5, 64, 64, dtype, DEVICE), gamma_of(6, dtype, DEVICE), attn_mask]
    kwargs = {"length": 50, "positions": positions}
    with sdpa_kernel(kernel), engines_used(monkeypatch) as used:
        assert_matches_eq11(lambda *x: sdpa(*x, **kwargs), inputs, lambda m: {**kwargs, "visible": m})
    assert used == ([] if engine is None else [engine])


DROPOUT = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@pytest.mark.usefixtures("plain_epilogue")  # for 1024 heads
@pytest.mark.parametrize("kernel", DROPOUT)
def test_dropout_drops_attention_and_never_the_mass(kernel: SDPBackend):
    """With values 1 the output is the row's undropped share on average; the mass takes its part whatever is dropped."""
    q, k, _ = qkv(16, 64, 64, 24, 24, 16, torch.float16, DEVICE)
    v = torch.ones_like(q)
    mask = stablemask(0.05, length=80)
    with sdpa_kernel(kernel):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.5, score_mod=mask).float()
        share = scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=mask).float()
    ratio = (out / share)[..., 0]
    # Of 1024 draws; the mean of row 0, which varies most, is 1 with a deviation of 1/32.
    torch.testing.assert_close(ratio.mean((0, 1)), torch.ones(24, device=DEVICE), atol=0.2, rtol=0)
    # Row 0 has one real score: it is dropped, or doubled.
    assert torch.all((ratio[..., 0] == 0) | ((ratio[..., 0] - 2).abs() < 2e-3))
    assert 400 < (ratio[..., 0] == 0).sum() < 624


@pytest.mark.parametrize("kernel", DROPOUT)
def test_dropout_gradient_uses_the_same_draw(kernel: SDPBackend):
    """out is linear in v: with values 1, its sum over rows is the sum over keys of dv, head by head, for the same draw."""
    q, k, _ = qkv(1, 64, 64, 64, 64, 64, torch.float16, DEVICE)
    v = torch.ones_like(q).requires_grad_()
    with sdpa_kernel(kernel):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.5, score_mod=stablemask(0.05, length=80))
    (dv,) = torch.autograd.grad(out, v, torch.ones_like(out))
    # A weight, and a sum of weights, is rounded to fp16 about thrice on either side: 6 * 2^-11 at the most.
    torch.testing.assert_close(dv[0, ..., 0].float().sum(-1), out[0, ..., 0].float().sum(-1), rtol=2**-8, atol=0)


def attention_ops(operations: Operations) -> list[str]:
    """The names of the attention ops that ran."""
    return [str(op) for op in operations.ran if "_scaled_dot_product_" in str(op)]


@pytest.mark.card("autocast of CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_as_sdpa(dtype: torch.dtype):
    q, k, v = qkv(2, 4, 4, 61, 61, 64, torch.float32, DEVICE)
    attn_mask = torch.zeros(61, 61, device=DEVICE)
    mask = stablemask(0.3)
    with torch.autocast("cuda", dtype):
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).dtype
        out = flex_attention(q, k, v, score_mod=mask)
        masked = scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, score_mod=mask)
        dense = flex_attention(q, k, v, score_mod=mask, kernel_options={"BACKEND": "MATH"})
        wide = flex_attention(q.double(), k.double(), v.double(), score_mod=mask)
    assert out.dtype == masked.dtype == dense.dtype == expected == dtype
    assert wide.dtype == torch.float64
    assert torch.equal(out, flex_attention(q.to(dtype), k.to(dtype), v.to(dtype), score_mod=mask))


@pytest.mark.parametrize(
    ("kernel", "engines"),
    [
        (SDPBackend.FLASH_ATTENTION, ["flash"]),
        (SDPBackend.CUDNN_ATTENTION, ["cudnn"]),
        (SDPBackend.EFFICIENT_ATTENTION, ["efficient"]),
        (SDPBackend.MATH, []),
    ],
)
def test_sdpa_kernel_is_honoured(kernel: SDPBackend, engines: list[str], monkeypatch: pytest.MonkeyPatch):
    q, k, v = qkv(1, 4, 4, 61, 61, 64, torch.bfloat16, DEVICE)
    with sdpa_kernel(kernel), engines_used(monkeypatch) as used:
        flex_attention(q, k, v, score_mod=stablemask(0.3))
        scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=stablemask(0.3))
    assert used == 2 * engines


@pytest.mark.card("torch's own function takes other ops on a CPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("call", ["causal", "mask", "one query"])
def test_the_automatic_engine_is_torchs_own(dtype: torch.dtype, kv_heads: int, call: str):
    """The same op runs as for the same call of torch's own function (none, where that is its math)."""
    rows = 1 if call == "one query" else 61
    q, k, v = qkv(2, 4, kv_heads, rows, 61, 64, dtype, DEVICE)
    kwargs: dict[str, Any] = {"enable_gqa": kv_heads != 4}
    if call == "causal":
        kwargs["is_causal"] = True
    if call == "mask":
        kwargs["attn_mask"] = torch.ones(61, 61, device=DEVICE, dtype=torch.bool).tril()
    with Operations() as theirs:
        F.scaled_dot_product_attention(q, k, v, **kwargs)
    mask = stablemask(0.3, length=70, positions=torch.arange(61 - rows, 61, device=DEVICE))
    with Operations() as ours:
        scaled_dot_product_attention(q, k, v, score_mod=mask, **kwargs)
    # torch's own math is an op of that name too.
    assert attention_ops(ours) == [name for name in attention_ops(theirs) if "_math" not in name]


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_chunk_of_queries_is_left_to_flash(kv_heads: int, monkeypatch: pytest.MonkeyPatch):
    """Flash alone aligns S != T to the end by itself: no kernel that would need a bias for it goes first, nor dense."""
    q, k, v = qkv(2, 4, kv_heads, 5, 61, 64, torch.bfloat16, DEVICE)
    mask = stablemask(0.3, length=70, positions=torch.arange(56, 61, device=DEVICE))
    with engines_used(monkeypatch) as used:
        flex_attention(q, k, v, score_mod=mask, enable_gqa=True)
        flex_attention(q.float(), k.float(), v.float(), score_mod=mask, enable_gqa=True)
    assert used[0] == "flash"
    assert used[1:] in ([], ["efficient"])
