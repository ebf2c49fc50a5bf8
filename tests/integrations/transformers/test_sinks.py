"""Models with learned attention sinks, on our engines: their own attention in float64, gradients and all."""

import pytest
import torch
from torch import Tensor

from tests.helpers.census.cases import Case
from tests.helpers.census.probes import Float64
from tests.helpers.transformers_models import LENGTH, agree, ragged, tokens


def case_of(model_type: str) -> Case:
    """The small model, with sinks that matter."""
    case = Case(model_type)
    torch.manual_seed(7)
    assert case.state is not None
    sinks = [name for name in case.state if name.endswith("sinks")]
    assert sinks
    for name in sinks:
        case.state[name].normal_()
    case.models.clear()
    return case


def results(case: Case, attention: str, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits at the real tokens, and every parameter's gradient of a fixed function of them."""
    model = case.model(attention)
    model.zero_grad()
    with Float64():
        logits = model(**inputs, use_cache=False).logits
        mask = inputs.get("attention_mask")
        logits = logits.flatten(0, 1) if mask is None else logits[mask.bool()]
        (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def inputs_of(kind: str) -> dict[str, Tensor]:
    return {"input_ids": tokens(2, LENGTH + 6)} if kind == "plain" else ragged([17, 5, 11], kind)[1]


@pytest.mark.parametrize("kind", ["plain", "left", "right"])
def test_gpt_oss_is_its_own_eager_attention(kind: str) -> None:
    case = case_of("gpt_oss")
    torch.manual_seed(1)
    inputs = inputs_of(kind)
    logits, grads = results(case, "sm_flex", **inputs)
    expected, expected_grads = results(case, "eager", **inputs)
    agree(logits, expected)
    assert set(grads) == set(expected_grads)
    for name, grad in grads.items():
        agree(grad, expected_grads[name])
    assert min(grad.abs().max() for name, grad in grads.items() if name.endswith("sinks")) > 1e-3
