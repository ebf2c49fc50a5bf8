"""absorb_sinks(): what it measures, what it writes, and a model that needs its first token no more."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from sm_flex_transformers import absorb_sinks
from tests.helpers.absorbing import ROWS, begun, causal, tokenizer, window, with_a_sink
from tests.helpers.transformers_models import COMMON, agree, config_class, model_of, tokens

CALLS: list[tuple[Tensor, Tensor, Tensor, float]] = []


def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **given: Any) -> tuple[Tensor, None]:
    CALLS.append((query, key, value, scaling))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("spy", spy)
AttentionMaskInterface.register("spy", lambda *args, **kwargs: None)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "sm_flex"])
def test_the_levels_and_values_are_those_of_the_whole_matrix(attention: str) -> None:
    texts = [x[0] for x in tokens(3, 30).split(1)]
    CALLS.clear()
    with torch.no_grad():
        for text in texts:
            causal(attention="spy")(text[None, : ROWS[1]], use_cache=False)
    found = absorb_sinks(causal(attention=attention), texts, rows=ROWS)
    for layer in range(2):
        calls = CALLS[layer::2]
        level, value, share = found.level[layer], found.value[layer], found.share[layer]
        assert level is not None
        assert value is not None
        assert share is not None
        agree(value, torch.stack([v[0, :, 0] for _, _, v, _ in calls]).mean(0), 1e-6 if attention == "eager" else 1e-9)
        rows = []
        for q, k, _, scale in calls:
            scores = q @ k.repeat_interleave(3, 1).transpose(-1, -2) * scale
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -math.inf)[0, :, slice(*ROWS)].exp()
            rows.append((scores[..., 0], scores[..., 1:].sum(-1)))
        first, others = [torch.cat(x, -1) for x in zip(*rows, strict=True)]
        agree(share, (first / (first + others)).mean(-1), 1e-6 if attention == "eager" else 1e-9)  # whose softmax is float32
        mass = level.exp()[:, None]
        agree((mass / (mass + others)).mean(-1), share, 1e-6 if attention == "eager" else 1e-9)


def test_what_is_written_is_all_that_from_pretrained_needs(tmp_path: Path) -> None:
    model, ids = causal(), tokens(2, 20)
    found = absorb_sinks(model, tokens(3, 30), rows=ROWS)
    given = model.config.stablemask
    assert set(given) == {"gamma", "length", "sink", "sink_value"}
    assert (given["gamma"], given["length"]) == (math.inf, COMMON["max_position_embeddings"])
    agree(torch.tensor(given["sink"], dtype=torch.float64), torch.stack(found.level))  # pyright: ignore
    assert torch.equal(torch.tensor(given["sink_value"]), torch.stack(found.value).float())  # pyright: ignore
    assert model.config._attn_implementation == "stablemask"
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="stablemask", dtype=torch.float64).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert (again(ids).logits - causal()(ids).logits).abs().max() > 1e-3


def test_a_window_that_drops_the_first_token_is_one_that_keeps_it() -> None:
    """Where a sink has one score from every row and one value, its mass is the first token itself."""
    model, ids = with_a_sink(), begun(tokens(2, 40))
    places = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        kept = model(ids, attention_mask=window(41, 8, 1), position_ids=places).logits
        alone = model(ids, attention_mask=window(41, 8), position_ids=places).logits
        found = absorb_sinks(model, begun(tokens(3, 30)), rows=ROWS)
        absorbed = model(ids, attention_mask=window(41, 8), position_ids=places).logits
    assert min(x.min() for x in found.share if x is not None) > 0.02
    agree(absorbed[:, 8:], kept[:, 8:], 1e-6)  # the config has the value in float32
    assert (alone[:, 8:] - kept[:, 8:]).abs().max() > 1e-2


def test_strings_are_read_with_the_tokenizer() -> None:
    texts = ["the cat sat on a mat and ran away", "a rose is a rose is a rose is"]
    made = tokenizer()
    ids = [torch.tensor(made(text)["input_ids"]) for text in texts]
    by_text, by_ids = (absorb_sinks(causal(), given, tokenizer=made, rows=ROWS) for given in (texts, ids))
    assert torch.equal(torch.stack(by_text.level), torch.stack(by_ids.level))  # pyright: ignore
    with pytest.raises(ValueError, match="tokenizer is required for texts that are strings"):
        absorb_sinks(causal(), texts, rows=ROWS)


def test_layers_with_a_window_have_none() -> None:
    model = causal("gemma3")
    found = absorb_sinks(model, tokens(2, 30), rows=ROWS)
    assert [x is None for x in found.level] == [True, False]
    assert [x is None for x in model.config.stablemask["sink_value"]] == [True, False]
    with torch.no_grad():
        assert model(tokens(1, 30)).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"MistralForCausalLM has no layer .* that sees all keys: there is no sink to absorb"):
        absorb_sinks(causal("mistral"), tokens(2, 30), rows=ROWS)


def test_a_gamma_stays_and_is_beside_the_sink() -> None:
    model = causal(attention="stablemask", stablemask={"gamma": 0.05, "length": 40})
    without = absorb_sinks(causal(), tokens(2, 30), rows=ROWS)
    torch.manual_seed(3)
    absorb_sinks(model, tokens(2, 30), rows=ROWS)
    assert (model.config.stablemask["gamma"], model.config.stablemask["length"]) == (0.05, 40)
    assert model.config.stablemask["sink"] != [x.tolist() for x in without.level if x is not None]


def test_a_training_model_is_measured_in_evaluation_and_left_training() -> None:
    model = causal(attention_dropout=0.5).train()
    found = absorb_sinks(model, texts := tokens(2, 30), rows=ROWS)
    assert model.training
    assert torch.equal(torch.stack(found.level), torch.stack(absorb_sinks(causal(), texts, rows=ROWS).level))  # pyright: ignore


def absorbed() -> Any:
    model = causal()
    absorb_sinks(model, tokens(1, 30), rows=ROWS)
    return model


def gpt_oss() -> Any:
    config = config_class("gpt_oss")(
        **{**COMMON, "stablemask": None}, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1
    )
    return model_of(config, "sm_flex")


@pytest.mark.parametrize(
    ("make", "texts", "error", "why"),
    [
        (absorbed, tokens(2, 30), ValueError, 'absorbed already: its config.stablemask has a "sink"'),
        (gpt_oss, tokens(2, 30), ValueError, "GptOssForCausalLM has learned attention sinks of its own"),
        (causal, tokens(2, 6), ValueError, r"text 0 has 6 tokens: it must be longer than 6, the first of the rows \(6, 24\)"),
        (causal, [], ValueError, "texts must hold at least one text, got none"),
        (causal, "a text", TypeError, "texts must be a list of strings or of token id tensors, got str"),
        (causal, [torch.zeros(30)], TypeError, r"got torch.float32 of shape \(30,\) at 0"),
        (causal, [5], TypeError, "got int at 0"),
    ],
)
def test_what_cannot_be_absorbed(make: Any, texts: Any, error: type, why: str) -> None:
    model = make()
    before = dict(model.config.stablemask or {})
    with pytest.raises(error, match=why):
        absorb_sinks(model, texts, rows=ROWS)
    assert (model.config.stablemask or {}) == before
