"""A sink that carries a value, out' = s o + p_sink v, against eq. 11 with one more column that has one."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.attention.varlen import AuxRequest as VarlenAuxRequest

from sm_flex import flex_attention, headwise_gamma, scaled_dot_product_attention, stablemask, varlen_attn
from sm_flex.testing import assert_matches_eq11
from sm_flex.testing.gradients import Attention
from tests.helpers.problems import documents, packed, qkv, unpacked

HEADS, KV_HEADS, LENGTH = 6, 2, 29
GAMMAS = {"inf": lambda: torch.tensor(math.inf).double(), "head-wise": lambda: headwise_gamma(HEADS).double()}
# How a sink may be given, from a learned (H,) and the shape (B, S) of the rows.
SINKS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "one per head": lambda s, b, n: s,
    "one for all": lambda s, b, n: s[2],
    "a table": lambda s, b, n: s[:, None] + torch.linspace(-1, 1, n).double(),
    "one per batch and head": lambda s, b, n: (s + torch.arange(b).double()[:, None])[..., None],
}


def a_sink() -> Tensor:
    return torch.linspace(-1.5, 2.0, HEADS, dtype=torch.float64)


def a_value(heads: int, dim: int) -> Tensor:
    return torch.randn(heads, dim, dtype=torch.float64)


def assert_matches(
    run: Attention,
    inputs: list[Tensor],
    gamma: Tensor,
    value_heads: int,
    with_lse_grad: bool,
    sink: str = "one per head",
    **options: Any,
) -> None:
    """run(q, k, v, gamma, s, value) is the oracle's, in out, lse and all gradients."""
    q, v = inputs[0], inputs[2]
    batch, num_rows = q.shape[0], q.shape[2]

    def oracle_kwargs(s: Tensor, value: Tensor) -> dict[str, Any]:
        return {"length": LENGTH, "sink": SINKS[sink](s, batch, num_rows), "sink_value": value, **options}

    constants = ["gamma"] if gamma.isinf().any() else []
    extra = [a_sink(), a_value(value_heads, v.shape[-1])]
    assert_matches_eq11(
        run, [*inputs, gamma, *extra], oracle_kwargs, constants=constants, with_lse_grad=with_lse_grad, tolerance=1e-10
    )


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("value_heads", [HEADS, KV_HEADS])
@pytest.mark.parametrize("v_dim", [7, 11])
@pytest.mark.parametrize("backend", ["AUTO", "MATH"])
def test_flex(backend: str, v_dim: int, value_heads: int, gamma: str, sink: str):
    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        out, aux = flex_attention(
            q, k, v, score_mod=stablemask(g, length=LENGTH, sink=SINKS[sink](s, 2, 13), sink_value=value), enable_gqa=True,
            kernel_options={"BACKEND": backend}, return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        return out, aux.lse

    inputs = qkv(2, HEADS, KV_HEADS, 13, 13, 7, v_dim=v_dim)
    assert_matches(run, inputs, GAMMAS[gamma](), value_heads, True, sink)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("value_heads", [HEADS, KV_HEADS])
@pytest.mark.parametrize("v_dim", [7, 11])
@pytest.mark.parametrize("chunk", [11, 23])
@pytest.mark.parametrize("learned_mask", [False, True])
def test_sdpa_with_fully_masked_rows(learned_mask: bool, chunk: int, v_dim: int, value_heads: int, gamma: str):
    """A mask that leaves rows without a key: what is left to them of the value, all of it where gamma has no mass."""
    positions = torch.arange(23 - chunk, 23)
    visible = torch.rand(2, 1, chunk, 23) > 0.5
    visible[:, :, 3] = False
    attn_mask = torch.zeros(visible.shape).double().masked_fill(~visible, -math.inf).requires_grad_() if learned_mask else visible

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor, value: Tensor) -> tuple[Tensor, None]:
        mask = stablemask(g, length=LENGTH, positions=positions, sink=s, sink_value=value)
        out = scaled_dot_product_attention(q, k, v, attn_mask, score_mod=mask, enable_gqa=True)
        if gamma == "inf":
            expected = value.repeat_interleave(HEADS // value_heads, dim=0)
            torch.testing.assert_close(out[:, :, 3], expected.expand(2, -1, -1))
        return out, None

    inputs = qkv(2, HEADS, KV_HEADS, chunk, 23, 7, v_dim=v_dim)
    assert_matches(run, inputs, GAMMAS[gamma](), value_heads, False, positions=positions, visible=visible)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("sink", ["one per head", "a table"])
@pytest.mark.parametrize("value_heads", [HEADS, KV_HEADS])
def test_a_chunk_longer_than_a_block_of_rows(value_heads: int, sink: str, gamma: str, monkeypatch: pytest.MonkeyPatch):
    from sm_flex.engines import cpu_chunks

    monkeypatch.setattr(cpu_chunks, "ROWS", 4)
    positions = torch.arange(10, 23)

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        mask = stablemask(g, length=LENGTH, positions=positions, sink=SINKS[sink](s, 2, 13), sink_value=value)
        out, aux = flex_attention(q, k, v, score_mod=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
        return out, aux.lse

    inputs = qkv(2, HEADS, KV_HEADS, 13, 23, 7)
    assert_matches(run, inputs, GAMMAS[gamma](), value_heads, True, sink, positions=positions)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("value_heads", [HEADS, KV_HEADS])
@pytest.mark.parametrize("v_dim", [7, 11])
@pytest.mark.parametrize("window", [-1, 4])
def test_varlen(window: int, v_dim: int, value_heads: int, gamma: str):
    cu, ids, positions = documents([5, 1, 17])

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        result = varlen_attn(
            packed(q), packed(k), packed(v), cu, cu, 17, 17, window_size=(window, 0), enable_gqa=True,
            score_mod=stablemask(g, length=LENGTH, sink=s, sink_value=value), return_aux=VarlenAuxRequest(lse=True),
        )  # fmt: skip
        assert isinstance(result, tuple)
        return unpacked(result[0]), result[1].unsqueeze(0)

    i = torch.arange(23)
    visible = ids.unsqueeze(1) == ids
    if window >= 0:
        visible = visible & (i.unsqueeze(1) - i <= window)
    inputs = qkv(1, HEADS, KV_HEADS, 23, 23, 7, v_dim=v_dim)
    assert_matches(run, inputs, GAMMAS[gamma](), value_heads, True, positions=positions, visible=visible)


def test_a_sink_of_minus_inf_gives_nothing_and_gradients_of_0():
    """Also in a row without any mass, and one without any key."""
    sink = torch.tensor([-math.inf, 0.0], requires_grad=True)
    value = torch.randn(2, 4, requires_grad=True)
    q, k, v = [x.requires_grad_() for x in qkv(1, 2, 2, 9, 9, 4, torch.float32)]
    visible = torch.ones(9, 9, dtype=torch.bool)
    visible[8] = False
    for backend in ("cpu", "dense"):
        attn_mask = visible if backend == "cpu" else torch.zeros(9, 9).masked_fill(~visible, -math.inf).requires_grad_()
        mask = stablemask(math.inf, length=9, sink=sink, sink_value=value)
        out = scaled_dot_product_attention(q, k, v, attn_mask, score_mod=mask)
        without = scaled_dot_product_attention(q, k, v, attn_mask, score_mod=stablemask(math.inf, length=9))
        torch.testing.assert_close(out[:, 0], without[:, 0])
        torch.testing.assert_close(out[:, 1, 8], value[1:])
        grads = torch.autograd.grad(out.square().sum(), (q, k, v, sink, value))
        assert all(torch.isfinite(grad).all() for grad in grads)
        assert grads[3][0] == 0 != grads[3][1]
        assert not grads[4][0].any()
        assert grads[4][1].all()


def mask_with(**changes: Any) -> Any:
    return stablemask(0.5, **{"length": LENGTH, "sink": torch.zeros(HEADS), "sink_value": torch.zeros(HEADS, 8), **changes})


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        ({"sink": None}, ValueError, "sink is required where sink_value is given"),
        ({"sink_value": 1.0}, TypeError, "sink_value must be a floating tensor, got float"),
        ({"sink_value": torch.zeros(HEADS, 8).long()}, TypeError, "sink_value must be a floating tensor, got dtype torch.int64"),
        ({"sink_value": torch.zeros(8)}, ValueError, r"sink_value must be \(H, Dv\), .* got shape \(8,\)"),
        ({"sink_value": torch.full((HEADS, 8), math.nan)}, ValueError, "sink_value must be finite"),
        ({"sink_value": torch.full((HEADS, 8), math.inf)}, ValueError, "sink_value must be finite"),
        ({"sink": math.inf}, ValueError, "sink must be a number below inf"),
    ],
)
def test_refused_when_made(changes: dict[str, Any], error: type[Exception], why: str):
    with pytest.raises(error, match=why):
        mask_with(**changes)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (torch.zeros(3, 8), r"sink_value must be \(H, Dv\) = \(6, 8\) or \(Hkv, Dv\) = \(2, 8\), got \(3, 8\)"),
        (torch.zeros(1, 8), r"sink_value must be \(H, Dv\) = \(6, 8\) or \(Hkv, Dv\) = \(2, 8\), got \(1, 8\)"),
        (torch.zeros(HEADS, 7), r"sink_value must be \(H, Dv\) = \(6, 8\) or \(Hkv, Dv\) = \(2, 8\), got \(6, 7\)"),
        (torch.zeros(HEADS, 8, device="meta"), "sink_value must be on the device of query, cpu, got meta"),
    ],
)
def test_refused_by_the_call(value: Tensor, why: str):
    q, k, v = qkv(2, HEADS, KV_HEADS, 13, 13, 8, torch.float32)
    with pytest.raises(ValueError, match=why):
        flex_attention(q, k, v, score_mod=mask_with(sink_value=value), enable_gqa=True)
    with pytest.raises(ValueError, match=why):
        scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=mask_with(sink_value=value), enable_gqa=True)
    cu = torch.tensor([0, 13], dtype=torch.int32)
    with pytest.raises(ValueError, match=why):
        varlen_attn(
            packed(q),
            packed(k),
            packed(v),
            cu,
            cu,
            13,
            13,
            window_size=(-1, 0),
            score_mod=mask_with(sink_value=value),
            enable_gqa=True,
        )


def test_eq_8_alone_has_no_column_for_it():
    with pytest.raises(ValueError, match=r"presoftmax .* sink"):
        stablemask(0.5, sink=0.0, sink_value=torch.zeros(2, 4)).presoftmax(*[torch.tensor(0.0)] * 5)
