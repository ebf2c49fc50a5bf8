"""Where a model is loaded or told to change its attention: who is refused, who is warned, and whose setting counts."""

import copy
import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CpmAntConfig,
    FalconConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    GitConfig,
    GitForCausalLM,
    GPTNeoConfig,
    LlamaForCausalLM,
    MambaConfig,
    MptConfig,
    OpenAIGPTConfig,
    PreTrainedModel,
    RwkvConfig,
    XLMConfig,
)

from sm_flex import headwise_gamma
from sm_flex_transformers import GammaSchedule, loading, settings
from tests.helpers.transformers_models import CONFIGS, agree, model_of, tokens

SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "n_embd": 32, "d_model": 32, "emb_dim": 32, "num_hidden_layers": 2, "n_layer": 2,
    "n_layers": 2, "num_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "dim_head": 8,
    "dim_ff": 32,
    "attention_types": [[["global"], 2]],
    "attention_hidden_size": 32, "intermediate_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
UNHEEDING = [
    OpenAIGPTConfig,
    XLMConfig,
    CpmAntConfig,
    RwkvConfig,
    BloomConfig,
    MptConfig,
    FalconConfig,
    GPTNeoConfig,
    MambaConfig,
]


def small(config: Any) -> Any:
    accepted = AutoConfig.for_model(config.model_type).to_dict()
    known = {name: value for name, value in SMALL.items() if name in accepted or name in config.attribute_map}
    return config(**known)


@pytest.mark.parametrize("config", UNHEEDING)
def test_a_model_that_never_looks_its_attention_up_is_refused_at_the_load(config: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(small(config), attn_implementation="eager")
    model.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="do not use Transformers' attention interface"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="stablemask")


@pytest.mark.parametrize("config", UNHEEDING)
def test_and_where_it_is_told_to_change(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(small(config), attn_implementation="eager")
    for asked in ("stablemask", {"": "stablemask"}):
        with pytest.raises(NotImplementedError, match="do not use Transformers' attention interface"):
            model.set_attn_implementation(asked)


def test_a_model_with_a_table_of_attentions_is_refused_in_words() -> None:
    """GIT's text attention is looked up in a table of classes, its image attention by name: stock stops with a KeyError."""
    config = GitConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
    config._attn_implementation = "stablemask"
    with pytest.raises(NotImplementedError, match="GitForCausalLM models do not use Transformers' attention interface"):
        GitForCausalLM(config)


def test_and_at_the_forward_where_the_config_was_changed_by_hand() -> None:
    model = BloomForCausalLM(small(BloomConfig))
    model.config._attn_implementation = "stablemask"
    with pytest.raises(NotImplementedError, match="do not use Transformers' attention interface"):
        model(tokens(1, 5))


def test_a_model_whose_source_cannot_be_read_is_trusted() -> None:
    """A class typed into a notebook: whether it asks for its attention cannot be told from here."""
    scope: dict[str, Any] = {"__name__": "nowhere", "Base": LlamaForCausalLM}
    exec("class Typed(Base):\n    pass", scope)
    config = CONFIGS["llama"]()
    config._attn_implementation = "stablemask"
    assert scope["Typed"](config)(tokens(1, 5)).logits.isfinite().all()


OWN_ATTENTION = """
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRMSNorm

class Attends(Base):
    def __init__(self, config, **more):
        super().__init__()
        self.config, self.o_proj = config, torch.nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, **more):
        x = hidden_states[:, None]
        return self.o_proj(F.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0]), None
"""


def test_a_model_that_attends_by_itself_is_refused_at_its_first_forward() -> None:
    """Its code cannot be known from here, but that it ran without a call of ours can."""
    scope: dict[str, Any] = {"__name__": "elsewhere", "torch": torch, "Base": torch.nn.Module}
    exec(OWN_ATTENTION, scope)
    model = model_of(CONFIGS["llama"]()).float()
    model(tokens(1, 5))
    other = model_of(CONFIGS["llama"]()).float()
    for layer in other.model.layers:
        layer.self_attn = scope["Attends"](other.config)
    with pytest.raises(NotImplementedError, match="LlamaModel ran without calling stablemask"):
        other(tokens(1, 5))


def test_no_other_attention_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """For any other name the wrapped methods call nothing of ours that could refuse, and answer as they did."""

    def never(*args: Any) -> None:
        raise AssertionError("asked about an attention that is not ours")

    monkeypatch.setattr(loading, "check_looks_up", never)
    original: Any = PreTrainedModel.get_correct_attn_implementation
    for config in (CONFIGS["llama"](), small(BloomConfig), small(MptConfig)):
        for name in ("eager", "sdpa", None):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            if name != "sdpa" or model._supports_sdpa:
                assert model.get_correct_attn_implementation(name) == original.__wrapped__(model, name)
        model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"
        assert not model._forward_pre_hooks
    with pytest.raises(ValueError, match="is not supported"):
        model_of(CONFIGS["llama"](), "sdpa").set_attn_implementation("no_such_attention")


def test_importing_twice_wraps_once() -> None:
    before = PreTrainedModel.set_attn_implementation
    loading.install()
    assert PreTrainedModel.set_attn_implementation is before


@pytest.fixture
def warnings_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged: Transformers' loggers do not propagate, and warn once a text."""
    heard: list[str] = []
    monkeypatch.setattr(loading.logger, "warning_once", heard.append, raising=False)
    return heard


def test_a_config_with_stablemask_under_another_attention_is_warned_about(warnings_of: list[str], tmp_path: Path) -> None:
    model_of(CONFIGS["llama"]()).save_pretrained(tmp_path)
    assert warnings_of == []
    AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="stablemask")
    assert warnings_of == []
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(warnings_of) == {
        "config.stablemask is set on this llama model, but it is built with another attention and runs without StableMask: "
        'pass attn_implementation="stablemask"'
    }
    assert isinstance(loading.logger, logging.Logger)


def test_a_setting_that_was_left_out_is_named(warnings_of: list[str], tmp_path: Path) -> None:
    """What a model ran with is then not saved: a later load cannot know it."""
    config = CONFIGS["llama"]()
    config.stablemask = None
    model_of(config)
    (said,) = set(warnings_of)
    assert "this llama model has no config.stablemask: it runs head-wise with N = max_position_embeddings, 64" in said


def test_a_wrong_setting_is_refused_at_the_load(tmp_path: Path) -> None:
    model_of(CONFIGS["llama"]()).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.stablemask = {"gama": 0.5}
    with pytest.raises(ValueError, match="knows gamma and length, got 'gama'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config, attn_implementation="stablemask")


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


def test_layers_with_other_numbers_of_heads_each_get_their_own() -> None:
    """Laguna's layers differ in their heads: head-wise means over the layer's own."""
    config = SimpleNamespace(
        stablemask={"gamma": "headwise", "length": 9}, num_attention_heads=4, num_attention_heads_per_layer=[4, 6]
    )
    for layer, heads in ((0, 4), (1, 6)):
        gamma, length = settings.read(config, layer, torch.device("cpu"))
        assert torch.equal(gamma, headwise_gamma(heads).double())
        assert length == 9
