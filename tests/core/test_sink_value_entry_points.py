"""A sink's value through every way in, and where only some of the tensors are learned."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from sm_flex import flex_attention, headwise_gamma, scaled_dot_product_attention, stablemask
from sm_flex.diagnostics import attention_map, first_token_share, real_share
from sm_flex.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from sm_flex.testing import oracle
from tests.helpers.flash_attn import MASKED, reference
from tests.helpers.problems import alibi, alibi_bias, qkv

HEADS, KV_HEADS, LENGTH = 4, 2, 29
GAMMA = headwise_gamma(HEADS).double()
SINK = torch.linspace(-1, 1, HEADS).double()


def a_value(heads: int = HEADS, dim: int = 8) -> Tensor:
    return torch.randn(heads, dim, dtype=torch.float64)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", MASKED, ids=str)
@pytest.mark.parametrize("value_heads", [HEADS, KV_HEADS])
@pytest.mark.parametrize("v_dim", [8, 5])
def test_flash_attn(v_dim: int, value_heads: int, options: dict[str, Any]):
    """A batch and packed documents, with everything that flash-attn adds to the scores; gradients too."""
    value = a_value(value_heads, v_dim).requires_grad_()
    q, k, v = [x.transpose(1, 2).requires_grad_() for x in qkv(2, HEADS, KV_HEADS, 9, 9, 8, v_dim=v_dim)]
    mask = stablemask(GAMMA, length=LENGTH, sink=SINK, sink_value=value)
    repeated = value.repeat_interleave(HEADS // value_heads, dim=0)  # as the reference repeats k and v
    eq_11 = {"gamma": GAMMA, "length": LENGTH, "sink": SINK, "sink_value": repeated}
    expected = torch.stack([reference(q[b], k[b], v[b], causal=True, stablemask=eq_11, **options)[0] for b in range(2)])
    cu = torch.tensor([0, 9, 18]).int()
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    outs = [flash_attn_func(q, k, v, causal=True, score_mod=mask, **options)]
    packed = flash_attn_varlen_func(flat[0], flat[1], flat[2], cu, cu, 9, 9, causal=True, score_mod=mask, **options)
    outs.append(packed.unflatten(0, (2, 9)))
    grad = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, (q, k, v, value), grad, retain_graph=True)
    for out in outs:
        close(out, expected)
        for a, b in zip(torch.autograd.grad(out, (q, k, v, value), grad, retain_graph=True), grads, strict=True):
            close(a, b)


def test_the_packed_forms_of_flash_attn():
    qkv_BS3HD = torch.randn(2, 9, 3, HEADS, 8, dtype=torch.float64)
    mask = stablemask(GAMMA, length=LENGTH, sink=SINK, sink_value=a_value())
    options: Any = {"causal": True, "score_mod": mask}
    q, k, v = qkv_BS3HD.unbind(2)
    expected = flash_attn_func(q, k, v, **options)
    close(flash_attn_qkvpacked_func(qkv_BS3HD, **options), expected)
    close(flash_attn_kvpacked_func(q, qkv_BS3HD[:, :, 1:], **options), expected)
    cu, flat = torch.tensor([0, 9, 18]).int(), qkv_BS3HD.flatten(0, 1)
    close(flash_attn_varlen_qkvpacked_func(flat, cu, 9, **options), expected.flatten(0, 1))
    kv = flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], cu, cu, 9, 9, **options)
    close(kv, expected.flatten(0, 1))


@pytest.mark.parametrize("window", [-1, 3])
def test_a_cache_step_by_step_is_one_pass(window: int):
    """flash_attn_with_kvcache, and its log-sum-exp."""
    mask = stablemask(GAMMA, length=LENGTH, sink=SINK, sink_value=a_value(KV_HEADS))
    q, k, v = [x.transpose(1, 2).contiguous() for x in qkv(2, HEADS, KV_HEADS, 9, 9, 8)]
    options: Any = {"causal": True, "score_mod": mask, "window_size": (window, 0)}
    whole = flash_attn_func(q, k, v, **options)
    k_cache, v_cache = torch.zeros(2, 16, KV_HEADS, 8).double(), torch.zeros(2, 16, KV_HEADS, 8).double()
    for i in range(9):
        new = slice(i, i + 1)
        out, lse = flash_attn_with_kvcache(
            q[:, new], k_cache, v_cache, k[:, new], v[:, new], cache_seqlens=torch.full((2,), i).int(),
            return_softmax_lse=True, **options,
        )  # fmt: skip
        close(out, whole[:, new])
        assert torch.isfinite(lse).all()
    learned = stablemask(GAMMA, length=LENGTH, sink=SINK, sink_value=a_value(KV_HEADS).requires_grad_())
    with pytest.raises(NotImplementedError, match="for inference"):
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=9, causal=True, score_mod=learned)
    other = stablemask(GAMMA, length=LENGTH, sink=SINK, sink_value=a_value(dim=7))
    with pytest.raises(ValueError, match=r"sink_value must be \(H, Dv\) = \(4, 8\) or \(Hkv, Dv\) = \(2, 8\), got \(4, 7\)"):
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=9, causal=True, score_mod=other)


def test_an_inner_score_mod_and_a_block_mask():
    q, k, v = qkv(2, HEADS, KV_HEADS, 23, 23, 8)
    value, i = a_value(), torch.arange(23)
    visible = i.unsqueeze(1) - i < 5
    block_mask = create_block_mask(lambda b, h, i, j: i - j < 5, None, None, 23, 23, device="cpu", BLOCK_SIZE=16)
    mask = stablemask(GAMMA, length=LENGTH, sink=SINK, sink_value=value, score_mod=alibi)
    out = flex_attention(q, k, v, score_mod=mask, block_mask=block_mask, enable_gqa=True)
    options: Any = {"bias": alibi_bias(HEADS, 23), "visible": visible, "sink": SINK, "sink_value": value}
    close(out, oracle(q, k, v, gamma=GAMMA, length=LENGTH, **options)[0])


def test_slots_that_do_not_follow_the_sequence():
    q, k, v = qkv(2, HEADS, KV_HEADS, 23, 23, 8)
    value, order = a_value(), torch.arange(22, -1, -1)
    block_mask = create_block_mask(lambda b, h, i, j: order[j] <= order[i], None, None, 23, 23, device="cpu", BLOCK_SIZE=16)
    options: Any = {"length": LENGTH, "sink": SINK, "sink_value": value}
    backwards = flex_attention(
        q, k, v, score_mod=stablemask(GAMMA, positions=order, ordered=False, **options), block_mask=block_mask, enable_gqa=True
    )
    forwards = flex_attention(*(x.flip(2) for x in (q, k, v)), score_mod=stablemask(GAMMA, **options), enable_gqa=True)
    close(backwards, forwards.flip(2))  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("engine", ["cpu", "dense"])
@pytest.mark.parametrize("learned", [(), ("sink",), ("value",), ("sink", "value"), ("gamma", "value")])
def test_whichever_is_learned(learned: tuple[str, ...], engine: str):
    """With q, k and v that are not: the gradients are those of the formula, and nothing else has one."""
    q, k, v = qkv(2, HEADS, KV_HEADS, 13, 13, 8)
    tensors = {"sink": SINK.clone(), "value": a_value(), "gamma": GAMMA.clone()}
    for name in learned:
        tensors[name].requires_grad_()
    sink, value, gamma = tensors.values()
    mask = stablemask(gamma, length=LENGTH, sink=sink, sink_value=value)
    options: Any = {"kernel_options": {"BACKEND": "MATH"}} if engine == "dense" else {}
    out = flex_attention(q, k, v, score_mod=mask, enable_gqa=True, **options)
    expected, _ = oracle(q, k, v, gamma=gamma, length=LENGTH, sink=sink, sink_value=value)
    close(out, expected)
    assert out.requires_grad == bool(learned)  # pyright: ignore[reportAttributeAccessIssue]
    if learned:
        leaves = [tensors[name] for name in learned]
        grad = torch.randn_like(expected)
        for a, b in zip(*(torch.autograd.grad(x, leaves, grad) for x in (out, expected)), strict=True):  # pyright: ignore
            close(a, b)


def test_a_parameter_of_another_dtype_gets_a_gradient_of_its_own():
    """A float32 value beside bf16 inputs, and beside float64 ones; a bf16 value."""
    for dtype, value_dtype in ((torch.bfloat16, torch.float32), (torch.float64, torch.float32), (torch.float32, torch.bfloat16)):
        q, k, v = qkv(2, HEADS, KV_HEADS, 13, 13, 8, dtype)
        value = a_value().to(value_dtype).requires_grad_()
        sink = SINK.to(value_dtype).requires_grad_()
        out = scaled_dot_product_attention(
            q, k, v, is_causal=True, score_mod=stablemask(0.3, length=LENGTH, sink=sink, sink_value=value), enable_gqa=True
        )
        assert out.dtype == dtype
        grads = torch.autograd.grad(out.double().square().sum(), (sink, value))
        assert [x.dtype for x in grads] == [value_dtype] * 2
        wide = [x.detach().double().requires_grad_() for x in (sink, value)]
        expected, _ = oracle(q, k, v, gamma=0.3, length=LENGTH, sink=wide[0], sink_value=wide[1])
        torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
        for a, b in zip(grads, torch.autograd.grad(expected.square().sum(), wide), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=5e-2, atol=5e-2)


def test_no_value_is_the_same_to_the_bit():
    q, k, v = qkv(2, HEADS, KV_HEADS, 13, 13, 8, torch.float32)
    masks = [stablemask(GAMMA, length=LENGTH, sink=SINK, sink_value=value) for value in (None, torch.zeros(HEADS, 8))]
    a, b = [flex_attention(q, k, v, score_mod=mask, enable_gqa=True) for mask in masks]
    assert torch.equal(a, b)  # pyright: ignore[reportArgumentType]


def test_a_value_changed_in_place_is_seen():
    q, k, v = qkv(2, HEADS, KV_HEADS, 13, 13, 8, torch.float32)
    sink, value = torch.zeros(HEADS), a_value().float()
    mask = stablemask(0.5, length=LENGTH, sink=sink, sink_value=value)
    before = flex_attention(q, k, v, score_mod=mask, enable_gqa=True)
    for changed in (sink, value):
        changed.fill_(3.0)
        after = flex_attention(q, k, v, score_mod=mask, enable_gqa=True)
        fresh = stablemask(0.5, length=LENGTH, sink=sink.clone(), sink_value=value.clone())
        assert torch.equal(after, flex_attention(q, k, v, score_mod=fresh, enable_gqa=True))  # pyright: ignore
        assert not torch.equal(before, after)  # pyright: ignore[reportArgumentType]
        before = after


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("engine", ["cpu", "dense"])
@pytest.mark.parametrize("name", ["sink", "value"])
def test_a_value_written_to_before_the_backward_raises(name: str, engine: str, blocks: bool, monkeypatch: pytest.MonkeyPatch):
    """Also where a block of rows is computed again: with the new numbers its gradients would be wrong."""
    from sm_flex.engines import cpu_chunks, dense

    if blocks:
        monkeypatch.setattr(cpu_chunks, "ROWS", 4)
        monkeypatch.setattr(dense, "BLOCK_SCORES", 1)
    q, k, v = [x.requires_grad_() for x in qkv(2, HEADS, KV_HEADS, 33, 40, 8)]
    tensors = {"sink": SINK.clone(), "value": a_value()}
    mask = stablemask(0.5, length=LENGTH, positions=torch.arange(7, 40), sink=tensors["sink"], sink_value=tensors["value"])
    options: Any = {"kernel_options": {"BACKEND": "MATH"}} if engine == "dense" else {}
    out = flex_attention(q, k, v, score_mod=mask, enable_gqa=True, **options)
    tensors[name].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_keeps_the_value(copied: Callable[[Any], Any]):
    q, k, v = qkv(2, HEADS, KV_HEADS, 13, 13, 8, torch.float32)
    mask = stablemask(0.5, length=LENGTH, sink=SINK, sink_value=a_value())
    outs = [flex_attention(q, k, v, score_mod=m, enable_gqa=True) for m in (mask, copied(mask))]
    assert torch.equal(outs[0], outs[1])  # pyright: ignore


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype):
    q, k, v = qkv(2, HEADS, KV_HEADS, 13, 13, 8, torch.float32)
    mask = stablemask(0.5, length=LENGTH, sink=SINK.float(), sink_value=a_value().float())
    with torch.autocast("cpu", dtype=dtype):
        out = flex_attention(q, k, v, score_mod=mask, enable_gqa=True)
    assert isinstance(out, Tensor)
    assert out.dtype == dtype
    expected = flex_attention(*(x.to(dtype) for x in (q, k, v)), score_mod=mask, enable_gqa=True)
    assert torch.equal(out, expected)  # pyright: ignore[reportArgumentType]


def test_dropout_leaves_it_alone():
    """It drops weights of real keys: with all of their values 0, out is p_sink * v as without it."""
    q, k, v = qkv(2, HEADS, KV_HEADS, 13, 13, 8)
    mask = stablemask(0.5, length=LENGTH, sink=SINK, sink_value=a_value())
    outs = [
        scaled_dot_product_attention(q, k, v * 0, is_causal=True, dropout_p=p, score_mod=mask, enable_gqa=True)
        for p in (0.0, 0.5)
    ]
    close(outs[1], outs[0])
    assert outs[0].abs().min() > 0


def test_diagnostics_show_the_real_keys():
    """What a sink carries is no key's: the map's rows sum to the real share, as beside a sink without a value."""
    q, k, _ = qkv(2, HEADS, KV_HEADS, 13, 13, 8)
    with_value, without = (stablemask(GAMMA, length=LENGTH, sink=SINK, sink_value=value) for value in (a_value(dim=5), None))
    for look in (attention_map, first_token_share, real_share):
        assert torch.equal(look(q, k, with_value), look(q, k, without))
    close(attention_map(q, k, with_value).sum(-1), real_share(q, k, with_value))
    with pytest.raises(ValueError, match="sink_value must be on the device of query"):
        real_share(q, k, stablemask(GAMMA, length=LENGTH, sink=SINK, sink_value=a_value().to("meta")))


def test_no_tensor_at_all():
    """Zero rows, and zero keys: every row is fully masked, and gives the value."""
    value = a_value()
    mask = stablemask(math.inf, length=LENGTH, positions=torch.arange(5), sink=SINK, sink_value=value)
    q, k, v = qkv(2, HEADS, KV_HEADS, 5, 0, 8)
    out = flex_attention(q, k, v, score_mod=mask, enable_gqa=True)
    close(out, value.unsqueeze(1).expand(2, -1, 5, -1))
    empty = flex_attention(q[:, :, :0], k, v, score_mod=stablemask(0.5, sink=SINK, sink_value=value), enable_gqa=True)
    assert empty.shape == (2, HEADS, 0, 8)  # pyright: ignore[reportAttributeAccessIssue]
