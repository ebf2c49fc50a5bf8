"""Where a model is loaded or told to change its attention: who is refused, who is warned, and whose setting counts."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CpmAntConfig,
    FalconConfig,
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
from sm_flex_transformers import loading, settings
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


@pytest.mark.parametrize("part", ["layers", "model"])
@torch.no_grad()
def test_a_model_of_compiled_parts_is_not_mistaken_for_one(part: str, fresh_compiler: None) -> None:
    model: Any = model_of(CONFIGS["llama"]())
    ids = tokens(1, 5)
    right = model_of(CONFIGS["llama"]())(ids).logits
    if part == "model":
        model.model = torch.compile(model.model, backend="eager")
    else:
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = torch.compile(layer, backend="eager")
    for _ in range(2):
        agree(model(ids, position_ids=torch.arange(5)[None]).logits, right)


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
    with pytest.raises(ValueError, match="knows gamma, length, sink and sink_value, got 'gama'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config, attn_implementation="stablemask")


def test_layers_with_other_numbers_of_heads_each_get_their_own() -> None:
    """Laguna's layers differ in their heads: head-wise means over the layer's own."""
    config = SimpleNamespace(
        stablemask={"gamma": "headwise", "length": 9}, num_attention_heads=4, num_attention_heads_per_layer=[4, 6]
    )
    for layer, heads in ((0, 4), (1, 6)):
        asked = settings.read(config, layer, torch.device("cpu"))
        assert asked is not None
        assert asked.gamma is not None
        assert torch.equal(asked.gamma, headwise_gamma(heads).double())
        assert asked.length == 9
