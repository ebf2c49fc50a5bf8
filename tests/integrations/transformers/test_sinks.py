"""Models with learned attention sinks, on our engines: their own attention in float64, gradients and all."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sm_flex.testing import assert_within_error_budget, oracle
from sm_flex_transformers import sm_flex_attention
from tests.helpers.census.cases import Case
from tests.helpers.census.probes import Float64
from tests.helpers.transformers_models import CONFIGS, LENGTH, agree, model_of, ragged, tokens

WITH_SINKS = ["gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash", "flint", "hy_v4", "deepseek_v4"]


def case_of(model_type: str) -> Case:
    """The small model, with sinks that matter."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no model type {model_type}")
    case = Case(model_type)
    torch.manual_seed(7)
    assert case.state is not None
    sinks = [name for name in case.state if name.endswith("sinks")]
    assert sinks
    for name in sinks:
        case.state[name].normal_()
    case.models.clear()
    return case


def results(case: Case, attention: str, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits at the real tokens, and every parameter's gradient of a fixed function of them."""
    model = case.model(attention)
    model.zero_grad()
    with Float64():
        logits = model(**{"use_cache": False, **inputs}).logits
        mask = inputs.get("attention_mask")
        logits = logits.flatten(0, 1) if mask is None else logits[mask.bool()]
        (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    agree(actual[0], expected[0])
    assert set(actual[1]) == set(expected[1])
    for name, grad in actual[1].items():
        scale = max(1.0, expected[1][name].abs().max().item())
        agree(grad / scale, expected[1][name] / scale)
    sinks = [grad for name, grad in actual[1].items() if name.endswith("sinks")]
    assert sinks
    assert min(grad.abs().max() for grad in sinks) > 1e-3


@pytest.mark.parametrize("model_type", WITH_SINKS)
def test_logits_and_all_gradients_are_those_of_its_own_attention(model_type: str) -> None:
    """Full and sliding layers. Steps in float32 are made in float64, or Granite's and Flint's softmax would round."""
    case = case_of(model_type)
    ids = tokens(2, LENGTH + 6)
    same(results(case, "sm_flex", input_ids=ids), results(case, "eager", input_ids=ids))


@pytest.mark.parametrize("kind", ["left", "right"])
def test_padding(kind: str) -> None:
    case, inputs = case_of("gpt_oss"), ragged([17, 5, 11], kind)[1]
    same(results(case, "sm_flex", **inputs), results(case, "eager", **inputs))


@pytest.mark.parametrize("model_type", ["gpt_oss", "granite_swa"])
def test_a_gamma_beside_the_sinks_is_equation_11(model_type: str) -> None:
    case = case_of(model_type)
    for inputs in ({"input_ids": tokens(2, LENGTH + 6)}, ragged([17, 5, 11], "left")[1]):
        ours = results(case, "stablemask", **inputs)
        same(ours, results(case, "oracle", **inputs))
        assert (ours[0] - results(case, "sm_flex", **inputs)[0]).abs().max() > 1e-2
    case.config.stablemask = {"gamma": "headwise", "length": LENGTH}  # sm_flex is then the same
    case.models.pop("sm_flex")
    again = results(case, "sm_flex", **inputs)
    assert torch.equal(again[0], ours[0])
    assert all(torch.equal(grad, ours[1][name]) for name, grad in again[1].items())


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("attention", ["sm_flex", "stablemask"])
def test_packed_rows_are_the_documents_one_by_one(attention: str, cache: bool) -> None:
    """gpt-oss's own attention mixes them, with a cache and without."""
    case, documents = case_of("gpt_oss"), [tokens(1, n) for n in (5, 11, 3)]
    positions = torch.cat([torch.arange(n) for n in (5, 11, 3)])[None]
    packed = {"input_ids": torch.cat(documents, 1), "position_ids": positions, "use_cache": cache}
    alone = {"sm_flex": "eager", "stablemask": "oracle"}[attention]
    agree(case.logits(attention, packed.pop("input_ids"), **packed),
          torch.cat([case.logits(alone, x, use_cache=False) for x in documents], 1))  # fmt: skip


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "qwen3"])
def test_without_sinks_it_is_sdpa(name: str) -> None:
    config = CONFIGS[name]()
    config.stablemask = None
    for inputs in ({"input_ids": tokens(2, LENGTH + 6)}, ragged([17, 5, 11], "left")[1]):
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        with torch.no_grad():
            ours, sdpa = [model_of(config, attention)(**inputs).logits[real] for attention in ("sm_flex", "sdpa")]
        agree(ours, sdpa)


def call(window: int | None, dtype: torch.dtype, *given: Tensor) -> tuple[Tensor, ...]:
    """A layer's output and all gradients, for q, k, v (B, H, S, D) and sinks (H,) of that dtype."""
    layer = model_of(CONFIGS["llama"](), "sm_flex").model.layers[0].self_attn
    layer.config.stablemask = None
    q, k, v, sinks = [x.to(dtype).requires_grad_() for x in given]
    out, _ = sm_flex_attention(layer, q, k, v, None, s_aux=sinks, sliding_window=window)
    out = out.transpose(1, 2)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(dtype))
    return tuple(x.detach() for x in (out, *(x.grad for x in (q, k, v, sinks) if x.grad is not None)))


def formula(window: int | None, dtype: torch.dtype, *given: Tensor, of: torch.dtype) -> tuple[Tensor, ...]:
    """Eq. 11 at gamma = inf, computed in dtype from inputs rounded to of."""
    q, k, v, sinks = [x.to(of).to(dtype).requires_grad_() for x in given]
    band = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    visible = band if window is None else band.triu(1 - window)
    out, lse = oracle(q, k, v, gamma=float("inf"), visible=visible, sink=sinks, dtype=dtype)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(of).to(dtype))
    return tuple(x.detach() for x in (out, *(x.grad for x in (q, k, v, sinks) if x.grad is not None), lse))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_within_the_error_budget(dtype: torch.dtype, window: int | None) -> None:
    """The sinks themselves are in that dtype, and float32 inside."""
    given = torch.randn(2, 6, 37, 8), torch.randn(2, 2, 37, 8), torch.randn(2, 2, 37, 8), torch.randn(6)
    exact, plain = [formula(window, computed, *given, of=dtype) for computed in (torch.float64, dtype)]
    for name, x, y, z in zip(("out", "dq", "dk", "dv", "d sinks"), call(window, dtype, *given), exact, plain, strict=False):
        assert x.dtype == dtype
        assert_within_error_budget(x, y, z, name, lse=exact[-1])


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 36, 37])
def test_a_layer_is_equation_11_within_its_window(window: int | None, rows: bool) -> None:
    """Sinks (H,), and one for each row too, as some models make them."""
    sinks = torch.randn(2, 6, 37) if rows else torch.randn(6)
    given = torch.randn(2, 6, 37, 8), torch.randn(2, 2, 37, 8), torch.randn(2, 2, 37, 8), sinks
    expected = formula(window, torch.float64, *given, of=torch.float64)
    given = (*given[:3], sinks[..., None] if rows else sinks)
    for x, y in zip(call(window, torch.float64, *given), expected, strict=False):
        agree(x.view_as(y), y)
