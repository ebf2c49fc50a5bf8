"""Edges that were wrong once, each with its test."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask
from torch.nn.attention.varlen import AuxRequest as VarlenAux

from sm_flex import flex_attention, log_mass, remask, scaled_dot_product_attention, stablemask, varlen_attn
from sm_flex.engines import cpu_chunks, dense
from sm_flex.testing import assert_matches_eq11, assert_within_error_budget, oracle
from sm_flex.testing.gradients import outputs_and_gradients
from sm_flex.visibility.blocks import narrow_block_mask
from tests.helpers.problems import DTYPES, packed, qkv, unpacked

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [0.5, math.inf])
def test_varlen_row_without_keys_and_without_mass(number: float):
    """A document with more queries than keys, its first rows at p = N-1 or gamma = inf: output 0, gradients 0, lse' = -inf."""
    cu_q, cu_k = torch.tensor([0, 3]).int(), torch.tensor([0, 1]).int()
    positions = torch.tensor([0, 1, 1])
    gamma = torch.tensor(number, dtype=torch.float64)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = varlen_attn(
            packed(q), packed(k), packed(v), cu_q, cu_k, 3, 1, window_size=(-1, 0), return_aux=VarlenAux(lse=True),
            score_mod=stablemask(gamma, length=2, positions=positions),
        )  # fmt: skip
        return unpacked(out), lse.unsqueeze(0).clamp(min=-1e3)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = oracle(q, k, v, gamma=gamma, length=2, positions=positions)
        return out, lse.clamp(min=-1e3)

    inputs = qkv(1, 2, 2, 3, 1, 8)
    grad_out, grad_lse = torch.randn(1, 2, 3, 8).double(), torch.randn(1, 2, 3).double()
    expected = outputs_and_gradients(reference, inputs, grad_out, grad_lse)
    for a, b in zip(outputs_and_gradients(run, inputs, grad_out, grad_lse), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivative_in_gamma():
    q, k, v = qkv(1, 2, 2, 5, 5, 8)

    def ours(gamma: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=stablemask(gamma, length=9)).sin().sum()

    def reference(gamma: Tensor) -> Tensor:
        return oracle(q, k, v, gamma=gamma, length=9)[0].sin().sum()

    gamma = torch.tensor(0.3).double()
    hessian = torch.autograd.functional.hessian
    torch.testing.assert_close(hessian(ours, gamma), hessian(reference, gamma))


def test_second_derivative_in_query_is_refused():
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 2, 5, 5, 8))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=stablemask(0.3))
    (dq,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
        torch.autograd.grad(dq.sum(), q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_mask_is_not_rounded(dtype: torch.dtype):
    """An ALiBi-like mask of values around -300 beside bf16 queries, on the CPU kernel: it asks no gradient of the mask."""
    q, k, v = (x.to(dtype) for x in qkv(2, 4, 4, 64, 64, 8, torch.float32))
    bias = torch.randn(64, 64) - 300.0
    out = scaled_dot_product_attention(q, k, v, attn_mask=bias, score_mod=stablemask(math.inf, length=64))
    reference, lse = oracle(q, k, v, gamma=math.inf, bias=bias)
    torch_out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias.masked_fill(~torch.ones(64, 64).tril().bool(), -math.inf)
    )
    assert_within_error_budget(out, reference, torch_out, lse=lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_float_mask_on_the_kernel(dtype: torch.dtype):
    bias = torch.randn(1, 6, 13, 13).to(dtype)

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, None]:
        mask = stablemask(gamma, length=13)
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True, score_mod=mask), None

    gamma = torch.linspace(0.1, 0.6, 6).to(dtype if dtype == torch.float64 else torch.float32)
    assert_matches_eq11(run, [*qkv(2, 6, 3, 13, 13, 8, dtype), gamma], {"bias": bias, "length": 13})


def test_positions_of_32_bits_with_a_length_beyond_them():
    for length in (70_000, 2**40):
        wide = log_mass(0.0, torch.arange(6), length)
        torch.testing.assert_close(log_mass(0.0, torch.arange(6).int(), length), wide, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.0, -1.0, -0.3])
def test_scale_that_is_not_positive(scale: float):
    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor | None]:
        out, aux = flex_attention(q, k, v, score_mod=stablemask(gamma, length=30), scale=scale, return_aux=AuxRequest(lse=True))
        return out, aux.lse

    inputs = [*qkv(1, 2, 2, 13, 13, 8), torch.tensor([0.3, 0.1]).double()]
    assert_matches_eq11(run, inputs, {"length": 30, "scale": scale})
    q, k, v = (packed(x) for x in inputs[:3])
    cu = torch.tensor([0, 13]).int()
    out = varlen_attn(q, k, v, cu, cu, 13, 13, window_size=(-1, 0), scale=scale, score_mod=stablemask(0.3, length=30))
    torch.testing.assert_close(unpacked(out), oracle(*inputs[:3], gamma=0.3, length=30, scale=scale)[0])


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5, 1e7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_of_lse_of_any_size(size: float, dtype: torch.dtype):
    """Beyond the range of fp16 itself: the columns that carry it are scaled by a power of two."""
    q, k, v = ((x * 0.01).to(dtype) for x in qkv(1, 2, 2, 9, 9, 8, torch.float32))
    grad_lse = torch.randn(1, 2, 9) * size / 9e3

    def dv_of(fn) -> Tensor:
        leaf = k.clone().requires_grad_()
        return torch.autograd.grad((fn(leaf) * grad_lse).sum(), leaf)[0]

    def lse(k: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=stablemask(0.3, length=20), return_lse=True)[1]

    reference = dv_of(lambda k: oracle(q, k, v, gamma=0.3, length=20)[1])
    torch.testing.assert_close(
        dv_of(lse).double(), reference.double(), rtol=2e-2, atol=2e-2 * reference.double().abs().max().item()
    )


@pytest.mark.parametrize("dynamic", [None, True])
def test_dropout_that_changes_under_compile(dynamic: bool | None, fresh_compiler: None):
    def run(q: Tensor, p: float) -> Tensor:
        return scaled_dot_product_attention(q, q, q, dropout_p=p, is_causal=True, score_mod=stablemask(0.5, length=20))

    q = torch.randn(1, 2, 13, 8)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(q, 0.0), run(q, 0.0))
    for p in (0.1, 0.3):
        assert torch.isfinite(compiled(q, p)).all()


def test_block_masks_kept_under_inference_serve_training():
    block_mask = create_block_mask(lambda b, h, i, j: i - j < 9, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    with torch.inference_mode():
        kept = [narrow_block_mask(None, 48, 48, CPU), narrow_block_mask(block_mask, 64, 64, CPU)]
    assert not any(mask.kv_indices.is_inference() for mask in kept)


def test_fake_tensors_are_not_kept():
    mask = stablemask(0.5, length=9)
    with FakeTensorMode(allow_non_fake_inputs=True):
        narrow_block_mask(None, 80, 80, CPU)
        mask.mass(torch.device("meta"), 9, 9, torch.float32)
    assert type(narrow_block_mask(None, 80, 80, CPU).kv_indices) is Tensor
    mass = mask.mass(torch.device("meta"), 9, 9, torch.float32)
    assert type(mass.log_mass_HS) is Tensor


def test_a_block_mask_with_a_new_mask_mod_is_narrowed_anew():
    block_mask = create_block_mask(lambda b, h, i, j: i - j < 9, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    before = narrow_block_mask(block_mask, 64, 64, CPU)
    block_mask.mask_mod = lambda b, h, i, j: i - j < 5
    after = narrow_block_mask(block_mask, 64, 64, CPU)
    index = torch.tensor(7), torch.tensor(0)
    assert before.mask_mod(index[1], index[1], *index)
    assert not after.mask_mod(index[1], index[1], *index)


def test_inner_score_mod_of_a_wider_dtype():
    table = torch.randn(13, dtype=torch.float64)
    q, k, v = qkv(1, 2, 2, 13, 13, 8, torch.float32)
    out = flex_attention(q, k, v, score_mod=stablemask(0.3, score_mod=lambda s, b, h, i, j: s + table[j]))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), oracle(q, k, v, gamma=0.3, bias=table)[0], rtol=1e-5, atol=1e-6)


def test_remask_keeps_the_dtype_of_lse():
    new_lse = remask(torch.randn(2, 5, 4), torch.randn(2, 5), torch.zeros(5, dtype=torch.float64))[1]
    assert new_lse.dtype == torch.float32


def test_max_q_shorter_than_a_document():
    cu = torch.tensor([0, 5]).int()
    q = torch.randn(5, 2, 8)
    with pytest.raises(ValueError, match="max_q must be at least the longest document, 5, got 4"):
        varlen_attn(q, q, q, cu, cu, 4, 5, window_size=(-1, 0), score_mod=stablemask(0.3, length=9))


def test_head_dim_of_zero():
    cu = torch.tensor([0, 5]).int()
    q = torch.empty(5, 2, 0)
    out = varlen_attn(q, q, q, cu, cu, 5, 5, window_size=(-1, 0), score_mod=stablemask(0.3, length=9))
    assert out.shape == (5, 2, 0)


@pytest.mark.parametrize("path", ["chunk", "dense"])
@pytest.mark.parametrize("what", ["key", "value", "attn_mask", "positions", "gamma", "sink"])
def test_what_changes_before_the_backward_of_row_blocks(path: str, what: str, monkeypatch: pytest.MonkeyPatch):
    """Row blocks are computed again in the backward: from what the forward saw, or autograd's own error says what was changed."""
    monkeypatch.setattr(cpu_chunks, "ROWS", 4)
    monkeypatch.setattr(dense, "BLOCK_SCORES", 1)
    monkeypatch.setattr(dense, "MIN_ROWS", 4)
    q, k, v = qkv(1, 2, 2, 9, 13, 8)
    q.requires_grad_()
    mask = torch.ones(9, 13, dtype=torch.bool)
    positions, gamma, sink = torch.arange(4, 13), torch.tensor([0.1, 0.5]).double(), torch.zeros(1, 9).double()
    changed = {"key": k, "value": v, "attn_mask": mask, "positions": positions, "gamma": gamma, "sink": sink}[what]

    def loss() -> Tensor:
        allowed = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if path == "chunk" else [SDPBackend.MATH]
        with sdpa_kernel(allowed):
            rule = stablemask(gamma, length=40, positions=positions, sink=sink)
            return scaled_dot_product_attention(q, k, v, mask, score_mod=rule).square().sum()

    (expected,) = torch.autograd.grad(loss(), q)
    late = loss()
    changed.copy_(~changed if changed.dtype == torch.bool else changed + 1)
    if what in ("key", "value", "attn_mask"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()
    else:
        torch.testing.assert_close(torch.autograd.grad(late, q)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_rows_after_the_last_document_are_zero(grad: bool, fresh_compiler: None):
    """Compiled, where nobody reads cu_seq_q: rows beyond it see nothing, at p = N-1 and at gamma = inf too. NaN would spread."""
    cu = torch.tensor([0, 5, 9], dtype=torch.int32)
    gamma = torch.tensor([math.inf, 0.5])
    q, k, v = [packed(x).requires_grad_(grad) for x in qkv(1, 2, 2, 14, 14, 8, torch.float32)]

    def attend(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        mask = stablemask(gamma, length=8)
        out = varlen_attn(q, k, v, cu, cu, 5, 5, window_size=(-1, 0), score_mod=mask)
        assert isinstance(out, Tensor)
        return out

    out = torch.compile(attend, fullgraph=True)(q, k, v, cu)
    expected = attend(q[:9], k[:9], v[:9], cu)
    torch.testing.assert_close(out, torch.cat([expected, torch.zeros(5, 2, 8)]))
    if grad:
        found, wanted = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected)]
        torch.testing.assert_close(found, wanted)


def test_compiled_keys_after_the_last_document_have_no_gradient(fresh_compiler: None):
    """A longer buffer of keys than the documents fill: its gradient has its length."""
    cu = torch.tensor([0, 5, 9], dtype=torch.int32)
    mask = stablemask(0.5, length=8, positions=torch.tensor([*range(5), *range(4)]))
    q, k, v = [packed(x).requires_grad_() for x in qkv(1, 2, 2, 9, 12, 8, torch.float32)]

    def attend(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        out = varlen_attn(q, k, v, cu, cu, 5, 5, window_size=(-1, 0), score_mod=mask)
        assert isinstance(out, Tensor)
        return out

    outs = torch.compile(attend, fullgraph=True)(q, k, v, cu), attend(q, k[:9], v[:9], cu)
    found, wanted = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in outs]
    torch.testing.assert_close(outs[0], outs[1])
    torch.testing.assert_close(found, wanted)
