"""generate() and caches with attn_implementation="stablemask": every cache gives the rows of one full pass."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache

from tests.helpers.transformers_models import COMMON, CONFIGS, LENGTH, WINDOW, agree, cache_name, model_of, ragged, tokens

MODELS = pytest.mark.parametrize("name", list(CONFIGS))
BEYOND = LENGTH + 12


def greedy(model: PreTrainedModel, **inputs: Any) -> Tensor:
    new = BEYOND - inputs["input_ids"].shape[1]
    return model.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=0)  # pyright: ignore[reportCallIssue]


@MODELS
def test_a_cached_step_is_the_full_pass_below_at_and_beyond_n(name: str) -> None:
    """Section 4.3: at every n the cache gives the logits of the whole prefix without one."""
    ids, model = tokens(2, BEYOND), model_of(CONFIGS[name]())
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        steps = [model(token, **{cache_name(model): cache}).logits for token in ids.split(1, dim=1)]
        agree(torch.cat(steps, 1), full)
        agree(model(ids[:, :LENGTH], use_cache=False).logits, full[:, :LENGTH])


@MODELS
def test_greedy_is_the_same_with_every_cache(name: str) -> None:
    model, ids = model_of(CONFIGS[name]()), tokens(3, 9)
    without = greedy(model, input_ids=ids, use_cache=False)
    assert torch.equal(greedy(model, input_ids=ids), without)
    assert torch.equal(greedy(model, input_ids=ids, cache_implementation="static"), without)
    with torch.no_grad():  # and it is not causal attention that agrees with itself
        assert (model(without).logits - model_of(CONFIGS[name](), "sdpa")(without).logits).abs().max() > 1e-2


@MODELS
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_left_padded_prompts_generate_what_they_do_alone(name: str, cache: str) -> None:
    prompts, inputs = ragged([9, 4, 1, 6], "left")
    model = model_of(CONFIGS[name]())
    options: dict[str, Any] = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    together = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=20, do_sample=False, **options
    )[:, 9:]
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)  # pyright: ignore[reportCallIssue]
        assert torch.equal(together[row], alone[0, prompt.shape[1] :]), row


@MODELS
def test_a_static_cache_logit_by_logit(name: str) -> None:
    """Prefill in one go with empty slots behind it, then steps, the unused slots seen by nobody."""
    ids, model = tokens(2, 15), model_of(CONFIGS[name]())
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache = StaticCache(config=model.config, max_cache_len=31)
        parts = [model(part, **{cache_name(model): cache}).logits for part in ids.split([6, 1, 1, 4, 3], dim=1)]
    agree(torch.cat(parts, 1), full)


@MODELS
def test_a_left_padded_loop_of_ones_own_needs_no_position_ids(name: str) -> None:
    """Prefill and cached steps with Transformers' default positions, 0..T-1 whatever the padding."""
    prompts, inputs = ragged([9, 4, 6], "left")
    model, new = model_of(CONFIGS[name]()), tokens(3, 5)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(inputs["input_ids"], attention_mask=mask, **{cache_name(model): cache})
        logits = []
        for token in new.split([1, 3, 1], dim=1):
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            logits.append(model(token, attention_mask=mask, **{cache_name(model): cache}).logits)
        for row, prompt in enumerate(prompts):
            alone = model(torch.cat([prompt, new[row : row + 1]], 1), use_cache=False).logits[:, prompt.shape[1] :]
            agree(torch.cat(logits, 1)[row : row + 1], alone, 1e-5)  # RoPE's angles are float32


def test_beyond_n_the_mass_is_tau() -> None:
    """From N on a row keeps tau = -(p+1) gamma: not plain causal, and not the mass of a longer training length."""
    ids = tokens(1, BEYOND)

    def logits(length: int, gamma: float) -> Tensor:
        config = CONFIGS["llama"]()
        config.num_hidden_layers, config.stablemask = 1, {"gamma": gamma, "length": length}
        with torch.no_grad():
            return model_of(config)(ids).logits[0]

    ours, causal, longer = logits(LENGTH, 0.05), logits(LENGTH, float("inf")), logits(2 * BEYOND, 0.05)
    beyond = slice(LENGTH, None)
    assert ((ours - causal)[beyond].abs().amax(1) > 1e-6).all()
    assert ((ours - longer)[beyond].abs().amax(1) > 1e-6).all()
    agree(ours[LENGTH - 1], causal[LENGTH - 1])  # the last row of eq. 11 has no mass


def test_window_attention_over_the_recent_keys_stays_finite_far_beyond_n() -> None:
    """Section 5.3: keys older than the window are gone, sinks and all."""
    model, ids = (
        model_of(MistralConfig(**{**COMMON, "max_position_embeddings": 4096}, num_key_value_heads=3, sliding_window=WINDOW)),
        tokens(1, 40 * LENGTH),
    )
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        chunks = [model(chunk, **{cache_name(model): cache}).logits for chunk in ids.split(101, dim=1)]
    assert full.isfinite().all()
    assert cache.layers[0].keys.shape[-2] == WINDOW - 1  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    agree(torch.cat(chunks, 1), full)
    # All that a token can know of lies within layers * (window - 1) tokens: the same logits from a cut context at its positions.
    with torch.no_grad():
        last = model(ids[:, -15:], position_ids=torch.arange(40 * LENGTH)[None, -15:], use_cache=False).logits
    agree(last[:, -1], full[:, -1])


def test_beam_search_reorders_the_cache() -> None:
    model, ids = model_of(CONFIGS["llama-gqa"]()), tokens(2, 5)
    options: dict[str, Any] = {"max_new_tokens": 8, "pad_token_id": 0, "num_beams": 3, "do_sample": False}
    with_cache = model.generate(ids, **options)  # pyright: ignore[reportCallIssue]
    assert torch.equal(with_cache, model.generate(ids, **options, use_cache=False))  # pyright: ignore[reportCallIssue]
