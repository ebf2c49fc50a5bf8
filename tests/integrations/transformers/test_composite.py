"""Models of text and images: whose config.stablemask counts, before and after it changes, in copies and when compiled."""

import copy
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
)

from sm_flex_transformers import GammaSchedule
from tests.helpers.transformers_models import agree


def composite(whole: Any = None, text: Any = None) -> Gemma3ForConditionalGeneration:
    """A model of text and images: config.stablemask of the whole, and of its text part."""
    text_sizes = {
        "vocab_size": 61, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6, "max_position_embeddings": 64, "pad_token_id": 0,
        "initializer_range": 0.3,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text_sizes,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=49,
        boi_token_index=48,
        eoi_token_index=47,
    )
    config.stablemask, config.get_text_config().stablemask = whole, text
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).double().eval()
    model.set_attn_implementation({"text_config": "stablemask"})
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=torch.arange(2, 14)[None]).logits


A, B = {"gamma": 2.0, "length": 2048}, {"gamma": 0.05, "length": 300}


def test_the_setting_of_a_composite_model_counts_for_its_text() -> None:
    right, default = logits(composite(text=A)), logits(composite())
    assert (right - default).abs().max() > 1e-2
    agree(logits(composite(whole=A)), right)
    agree(logits(composite(whole=B, text=A)), right)  # the part's own counts
    model = composite()
    model.config.stablemask = A  # also where it is set after the load
    agree(logits(model), right)


def test_the_setting_of_a_composite_model_goes_with_its_copies_and_its_parts() -> None:
    model = composite(whole=A)
    right = logits(model)
    agree(logits(copy.deepcopy(model)), right)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    agree(logits(loaded), right)
    loaded.config.stablemask = B
    agree(logits(loaded), logits(composite(whole=B)))
    text, ids = model.model.language_model, torch.arange(2, 14)[None]
    with torch.no_grad():
        before = text(ids).last_hidden_state
        del model
        agree(text(ids).last_hidden_state, before)


def test_a_setting_of_the_text_that_changes_afterwards_counts() -> None:
    """As GammaSchedule writes it, step by step; then the whole's, once that changes."""
    model = composite(whole=A)
    logits(model)
    model.config.get_text_config().stablemask = B
    agree(logits(model), logits(composite(text=B)))
    model.config.stablemask = {**A, "gamma": 0.5}
    agree(logits(model), logits(composite(text={**A, "gamma": 0.5})))


def test_a_composite_model_compiles_with_a_setting_of_the_whole(fresh_compiler: None) -> None:
    model = composite(whole=A)
    compiled = torch.compile(model, backend="eager")
    agree(logits(compiled), logits(model))
    unset = composite()
    compiled = torch.compile(unset, backend="eager")
    agree(logits(compiled), logits(unset))
    unset.config.stablemask = A
    agree(logits(compiled), logits(model))


def test_the_setting_of_a_composite_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model = composite(whole=A)
    model.save_pretrained(tmp_path)
    loaded = Gemma3ForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation={"text_config": "stablemask"}, dtype=torch.float64
    ).eval()
    assert loaded.config.stablemask == A
    agree(logits(loaded), logits(model), 1e-4)  # a buffer of the embedding was float32
    assert (logits(loaded) - logits(composite())).abs().max() > 1e-2
    with pytest.raises(ValueError, match=r"is 2.0 and the target of GammaSchedule 'headwise': pass target=2.0"):
        GammaSchedule(5).on_train_begin(None, SimpleNamespace(global_step=0), None, model=loaded)


def test_the_setting_of_the_whole_counts_where_layers_have_configs_of_their_own() -> None:
    """Gemma 4: a layer's config is a new object, which nothing ties to the whole."""
    text = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 61, "num_kv_shared_layers": 0, "initializer_range": 0.3,
    }  # fmt: skip
    made = []
    for whole in ({"gamma": float("inf"), "length": 23}, None):
        config = Gemma4Config(text_config=text, vision_config=None, audio_config=None)
        config.stablemask = whole
        torch.manual_seed(0)
        made.append(Gemma4ForConditionalGeneration(config).double().eval())
    for model in made:
        model.set_attn_implementation({"text_config": "stablemask"})
    asked_for, default = map(logits, made)
    made[0].set_attn_implementation({"text_config": "sdpa"})
    agree(asked_for, logits(made[0]))
    assert (asked_for - default).abs().max() > 1e-2


def test_a_wrong_setting_of_the_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="must be >= 0"):
        logits(composite(whole={"gamma": -1.0, "length": 9}))
    assert composite(whole=A).config.get_text_config().stablemask == A
