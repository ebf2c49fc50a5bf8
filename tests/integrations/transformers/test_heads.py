"""Layers with head counts of their own: each with the gammas of its heads, and a list that cannot fit them all refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from sm_flex import headwise_gamma
from sm_flex_transformers import GammaSchedule, settings, stablemask_attention
from tests.helpers.transformers_models import COMMON, LENGTH, agree, config_class, eq_11, model_of, tokens

SMALL: dict[str, Any] = {**COMMON, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}


def laguna(**options: Any) -> PreTrainedModel:
    small = {
        **SMALL,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    config = config_class("laguna")(**{**small, "num_attention_heads_per_layer": [4, 6], **options})
    config._experts_implementation = "eager"
    return model_of(config)


def step3p7(**options: Any) -> PreTrainedModel:
    if not hasattr(transformers.models, "step3p7"):
        pytest.skip(f"transformers {transformers.__version__} has no step3p7")
    package: Any = transformers.models.step3p7
    types = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 7, "mlp_layer_types": ["dense"] * 2}
    config = package.configuration_step3p7.Step3p7TextConfig(**{**SMALL, **types, "num_sliding_attention_heads": 6, **options})
    torch.manual_seed(0)
    return package.modeling_step3p7.Step3p7TextModel._from_config(config, attn_implementation="stablemask").double().eval()


def layers_of(model: Any) -> list[nn.Module]:
    return [layer.self_attn for layer in getattr(model, "model", model).layers]


@pytest.mark.parametrize("make", [laguna, step3p7])
def test_each_layer_has_the_gammas_of_its_own_heads(make: Any) -> None:
    model = make()
    assert [settings.num_heads(per_layer(model.config, i), i) for i in range(2)] == [4, 6]
    for layer, heads in zip(layers_of(model), (4, 6), strict=True):
        q, k = torch.randn(1, heads, 9, 8).double(), torch.randn(1, 2, 9, 8).double()
        positions = torch.arange(9)[None]
        out, _ = stablemask_attention(layer, q, k, k, None, position_ids=positions)
        expected = eq_11(q, k, k, gamma=headwise_gamma(heads), length=LENGTH, mask=None, position_ids=positions)
        agree(out, expected)


def per_layer(config: Any, layer: int) -> Any:
    return config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config


@pytest.mark.parametrize("make", [laguna, step3p7])
@pytest.mark.parametrize(("gamma", "layer", "heads"), [([0.1] * 4, 1, 6), ([0.1] * 6, 0, 4)])
def test_a_list_that_does_not_fit_a_layer_is_refused(make: Any, gamma: list[float], layer: int, heads: int) -> None:
    said = rf'"gamma"\] of layer {layer} must have one number for each of the model\'s {heads} query heads, got {len(gamma)}'
    with pytest.raises(ValueError, match=said):
        make(stablemask={"gamma": gamma, "length": LENGTH})(tokens(1, 5))


def test_a_list_for_each_layer_is_that_layers_own() -> None:
    own = {i: {"stablemask": {"gamma": headwise_gamma(n).tolist(), "length": LENGTH}} for i, n in enumerate((4, 6))}
    ids = tokens(2, 9)
    with torch.no_grad():
        agree(laguna(per_layer_config=own)(ids).logits, laguna()(ids).logits)
        own[1]["stablemask"]["gamma"] = [0.3] * 6
        assert (laguna(per_layer_config=own)(ids).logits - laguna()(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("make", [laguna, step3p7])
def test_a_schedule_of_one_number_serves_them_and_of_headwise_is_refused(make: Any) -> None:
    model = make(stablemask=None)
    start = SimpleNamespace(global_step=0, max_steps=9)
    GammaSchedule(5, target=0.5).on_train_begin(None, start, None, model=model)
    with torch.no_grad():
        model(tokens(1, 5))
    assert model.config.stablemask["gamma"] == float("inf")
    with pytest.raises(ValueError, match="layers have 4 or 6 query heads, and GammaSchedule sets one gamma per head"):
        GammaSchedule(5).on_train_begin(None, start, None, model=make(stablemask=None))
