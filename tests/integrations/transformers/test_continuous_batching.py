"""generate_batch(): many requests in one row of tokens over a paged cache, each what it is alone."""

import itertools
from typing import Any, cast

import pytest
import transformers
from packaging.version import parse
from torch import Tensor
from transformers import GenerationConfig, GptOssConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from tests.helpers.transformers_models import COMMON, CONFIGS, LENGTH, SOFT_CAPPED, WINDOW, model_of, tokens

NEW = 12
served = pytest.mark.skipif(parse(transformers.__version__).release < (5, 24), reason="the attention function writes the cache")
GREEDY = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=-1)
SINKS = GptOssConfig(
    **COMMON, num_key_value_heads=2, head_dim=8, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1,
    layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
SINKS._experts_implementation = "eager"


def batched(model: PreTrainedModel, prompts: list[Tensor], **options: Any) -> list[Any]:
    """What each request came to. A step has room for 16 tokens, so that the longer prompts go in chunks."""
    small = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=16, **options)
    found = model.generate_batch(  # pyright: ignore[reportCallIssue]
        [prompt[0].tolist() for prompt in prompts], generation_config=GREEDY, continuous_batching_config=small
    )
    return [found[name] for name in sorted(found, key=lambda name: int(name.split("_")[-1]))]


def alone(model: PreTrainedModel, prompt: Tensor) -> list[int]:
    made = model.generate(prompt, max_new_tokens=NEW, do_sample=False, pad_token_id=0)  # pyright: ignore[reportCallIssue]
    return made[0, prompt.shape[1] :].tolist()


@served
@pytest.mark.parametrize(
    ("name", "attention"),
    [*itertools.product(["llama-gqa", "mistral", "gpt_oss"], ["stablemask", "sm_flex"]), ("mistral", "sdpa")],
)
def test_each_request_is_what_it_is_alone(name: str, attention: str) -> None:
    """Windows, sinks, chunks of a prompt and rows beyond N among them; other attentions are what they were."""
    config = SINKS if name == "gpt_oss" else CONFIGS[name]()
    prompts = [tokens(1, n) for n in (9, 1, LENGTH + 4, 14)]
    config.stablemask = COMMON["stablemask"] if attention == "stablemask" else None
    model = model_of(config, attention)
    requests = batched(model, prompts)
    assert [request.error for request in requests] == [None] * 4
    assert [request.generated_tokens for request in requests] == [alone(model, prompt) for prompt in prompts]
    assert model.config._attn_implementation == attention
    if attention == "stablemask":  # and it is not the model without
        config.stablemask = {"gamma": float("inf"), "length": LENGTH}
        without = model_of(config)
        assert [request.generated_tokens for request in requests] != [alone(without, prompt) for prompt in prompts]


@served
def test_flash_attention_is_not_put_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers prefers it where it is installed: it would be plain causal attention."""
    monkeypatch.setattr(continuous_api, "is_flash_attn_2_available", lambda **_: True)
    monkeypatch.setattr(continuous_api, "is_flash_attn_3_available", lambda **_: False)
    chosen: list[str] = []
    for attention in ("stablemask", "sm_flex", "sdpa"):
        model = model_of(CONFIGS["llama"](), attention)
        monkeypatch.setattr(model, "set_attn_implementation", chosen.append)
        ContinuousBatchingManager(cast(Any, model), GREEDY, ContinuousBatchingConfig())
    assert chosen == ["flash_attention_2"]  # of sdpa alone


@served
def test_what_packed_rows_do_not_take_is_refused() -> None:
    request, *_ = batched(model_of(SOFT_CAPPED), [tokens(1, 5)])
    assert "Gemma2Attention (layer 0) has softcap, which continuous batching does not take: use generate()" in request.error
    with pytest.raises(NotImplementedError, match="use_cuda_graph must be False with stablemask or sm_flex, got True"):
        batched(model_of(CONFIGS["llama"]()), [tokens(1, 5)], use_cuda_graph=True)


@served
def test_a_window_that_is_not_named_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask holds it here: the layer would see every key."""
    config = CONFIGS["gemma3"]()
    model = model_of(config)
    model.model.layers[0].self_attn.sliding_window = None
    request, *_ = batched(model, [tokens(1, 5)])
    assert "has a window that it does not name, which continuous batching does not take" in request.error


def test_a_transformers_that_writes_the_cache_elsewhere_is_refused() -> None:
    if served.args[0]:
        with pytest.raises(NotImplementedError, match=r"continuous batching with stablemask needs Transformers 5\.24, got 5"):
            batched(model_of(CONFIGS["llama"]()), [tokens(1, 5)])
    else:
        assert batched(model_of(CONFIGS["llama"]()), [tokens(1, 5)])[0].error is None
