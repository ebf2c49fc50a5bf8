"""Corner cases of flash-attn's functions: each was once NaN, another dtype, a failed trace or too large a tensor."""

from typing import Any

import pytest
import torch

from sm_flex.engines import dense
from sm_flex.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from sm_flex.visibility.rows import document_rows
from tests.helpers.flash_attn import reference
from tests.helpers.watching import Largest


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(scale: float, causal: bool) -> None:
    """torch's causal kernel for CPUs gives NaN for it."""
    q, k, v = (torch.randn(1, 40, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    options: dict[str, Any] = {"softmax_scale": scale, "causal": causal}
    ours, expected = flash_attn_func(q, k, v, **options)[0], reference(q[0], k[0], v[0], **options)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_a_value_of_another_head_dim_holds_no_square_of_scores(causal: bool) -> None:
    q = torch.randn(1, 1000, 1, 8, requires_grad=True)
    v = torch.randn(1, 1000, 1, 4)
    with Largest() as largest:
        out = flash_attn_func(q, q, v, causal=causal)
        out.sum().backward()
    assert 1000 * 8 <= largest.elements < 1000 * 1000 // 4
    torch.testing.assert_close(out[0], reference(q[0], q[0], v[0], causal=causal)[0])


@pytest.mark.parametrize("options", [{}, {"return_softmax_lse": True}, {"window_size": (2, 0)}], ids=str)
def test_a_cache_keeps_the_dtype_of_q_under_autocast(options: dict[str, Any]) -> None:
    q, cache = torch.randn(2, 1, 4, 8), torch.randn(2, 16, 2, 8)
    expected = flash_attn_with_kvcache(q, cache, cache, cache_seqlens=5, **options)
    with torch.autocast("cpu", torch.bfloat16):
        ours = flash_attn_with_kvcache(q, cache, cache, cache_seqlens=5, **options)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_slopes_that_are_written_to_before_the_backward_change_no_gradient(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    """It computes the scores of a block of rows again."""
    monkeypatch.setattr(dense, "BLOCK_SCORES", 1000)
    q, slopes = torch.randn(1, 70, 2, 5, requires_grad=True), torch.rand(2)
    out = flash_attn_func(q, q, q, alibi_slopes=slopes, causal=causal)
    (before,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    slopes.mul_(5)
    (after,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(before, after)
    assert before.abs().max() > 0.1


@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads_of_dynamic_shapes_compile(causal: bool) -> None:
    torch._dynamo.reset()
    q, k = torch.randn(2, 9, 4, 8), torch.randn(2, 9, 2, 8)
    compiled = torch.compile(lambda q, k: flash_attn_func(q, k, k, causal=causal), fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(q, k), flash_attn_func(q, k, k, causal=causal))


@pytest.mark.parametrize("options", [{}, {"window_size": (2, 0)}, {"softcap": 2.0}, {"alibi_slopes": torch.ones(4)}], ids=str)
def test_no_queries_and_no_sequences(options: dict[str, Any]) -> None:
    q, cache, cu = torch.randn(2, 3, 4, 8), torch.randn(2, 16, 2, 8), torch.zeros(2).int()
    held = torch.zeros(0).int()
    assert flash_attn_func(q[:, :0], cache, cache, **options).shape == (2, 0, 4, 8)
    assert flash_attn_func(q[:0], cache[:0], cache[:0], **options).shape == (0, 3, 4, 8)
    cu_k = torch.tensor([0, 16]).int()
    assert flash_attn_varlen_func(q[0, :0], cache[0], cache[0], cu, cu_k, 0, 16, **options).shape == (0, 4, 8)
    out = flash_attn_with_kvcache(q[:0], cache[:0], cache[:0], cache_seqlens=held, **options)
    assert isinstance(out, torch.Tensor)
    assert out.shape == (0, 3, 4, 8)


@pytest.mark.parametrize("softcap", [float("inf"), 1e300, 1e-300])
def test_a_softcap_beyond_float32_is_refused(softcap: float) -> None:
    q = torch.randn(1, 3, 2, 8)
    with pytest.raises(ValueError, match="softcap must be within the range of float32, or 0 for none, got"):
        flash_attn_func(q, q, q, softcap=softcap)


@pytest.mark.parametrize("options", [{"window_size": (9, 1)}, {"softcap": 2.0}, {"alibi_slopes": torch.ones(2)}], ids=str)
def test_compiled_rows_after_the_last_document_see_nothing(options: dict[str, Any]) -> None:
    """Eagerly they are refused; a trace knows no values of cu_seqlens."""
    torch._dynamo.reset()
    q, cu = torch.randn(9, 2, 8), torch.tensor([0, 3, 7]).int()
    ours = torch.compile(lambda q, cu: flash_attn_varlen_func(q, q, q, cu, cu, 4, 4, **options), fullgraph=True, backend="eager")
    out = ours(q, cu)
    torch.testing.assert_close(out[:7], flash_attn_varlen_func(q[:7], q[:7], q[:7], cu, cu, 4, 4, **options))
    assert (out[7:] == 0).all()


def test_the_dense_engine_leaves_out_rows_and_keys_after_the_last_document() -> None:
    cu = torch.tensor([0, 3, 7]).int()
    seen = document_rows(cu, cu, 9, 9, -1, -1)(0, 9)
    assert torch.equal(seen, torch.block_diag(torch.ones(3, 3), torch.ones(4, 4), torch.zeros(2, 2)).bool())
