"""The census: each causal language model type of Transformers is right by eq. 11 in every call, or refused in true words.

Under "sm_flex" right is the type's own attention.

A sample runs by default, every type with ``pytest -m census``. What came of each is printed at the end of the run.
"""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from transformers import AttentionInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sm_flex_transformers import forwards, stablemask_attention
from tests.helpers.census.cases import CALLS
from tests.helpers.census.configs import model_types
from tests.helpers.census.judge import NOT_BUILT, REFUSED, RIGHT, WRONG, Outcome, judge_type
from tests.helpers.census.report import verdict

Record = Callable[[str, Any], None]
# By kind of attention, the types that are served in a full pass, and those that are refused, with the reason.
SERVED = {
    "full": ["llama", "gpt2", "bert", "clip_text_model"],
    "grouped heads": ["qwen3", "gpt_bigcode"],
    "windows and soft-capping": ["mistral", "gemma2", "gemma3_text", "modernbert-decoder"],
    "shared keys": ["gemma3n_text", "gemma4_text"],
    "latent keys": ["deepseek_v3"],
    "keys chosen by an indexer": ["mistral_large4_text", "minimax_m3_vl_text"],
    "linear attention between": ["qwen3_next", "minimax", "lfm2"],
    "state spaces between": ["bamba", "zamba2"],
    "pairs of heads, and other heads in each layer": ["diffllama", "laguna"],
    "several position axes": ["qwen2_vl_text"],
    "a bias on the scores": ["inkling_text"],
    "composite": ["gemma3", "gemma4"],
    "no position_ids": ["persimmon", "dory", "recurrent_gemma"],
    "attention sinks": ["gpt_oss", "granite_swa"],
}
NOT_SERVED = {
    "never looks its attention up": ["bloom", "openai-gpt", "xlm", "mamba", "falcon"],
    "asks for a bidirectional mask": ["bart"],
    "a layer that is not causal": ["inkling2_text"],
    "no position_ids": ["llama4_text", "deepseek_v32"],
}
EXPECTED = {name: Outcome(RIGHT) for names in SERVED.values() for name in names} | {
    name: Outcome(REFUSED, reason) for reason, names in NOT_SERVED.items() for name in names
}
# What sm_flex serves beside them, and why it refuses some calls: sinks, types that hand their attention no position_ids.
SM_FLEX = {
    **{name: set[str]() for name in ("gpt_oss", "inkling_text", "mimo_v2_flash", "flint", "deepseek_v4", "gemma2", "mistral")},
    **{name: {"documents with a cache, no position_ids"} for name in ("hy_v4", "llama4_text", "cohere_compass_text")},
}


def outcomes_of(model_type: str, record: Record, attention: str = "stablemask") -> dict[str, Outcome]:
    if model_type not in CONFIG_MAPPING and model_type not in model_types():
        pytest.skip(f"this Transformers has no model type {model_type}")
    outcomes = judge_type(model_type, attention)
    record("census", (attention, model_type, {call: tuple(outcome) for call, outcome in outcomes.items()}))
    assert not {call: outcome.reason for call, outcome in outcomes.items() if outcome.verdict == WRONG}
    return outcomes


@pytest.mark.parametrize("model_type", EXPECTED)
def test_a_sample(model_type: str, record_property: Record) -> None:
    full = outcomes_of(model_type, record_property)["full pass"]
    assert full.verdict == EXPECTED[model_type].verdict
    if full.verdict == REFUSED:
        assert full.reason == EXPECTED[model_type].reason


@pytest.mark.parametrize("model_type", SM_FLEX)
def test_a_sample_of_sm_flex(model_type: str, record_property: Record) -> None:
    outcomes = outcomes_of(model_type, record_property, "sm_flex")
    assert {outcome.reason for outcome in outcomes.values() if outcome.verdict == REFUSED} == SM_FLEX[model_type]


@pytest.mark.census
@pytest.mark.parametrize("attention", ["stablemask", "sm_flex"])
@pytest.mark.parametrize("model_type", model_types())
def test_every_type(model_type: str, attention: str, record_property: Record) -> None:
    outcomes_of(model_type, record_property, attention)


# What the census must not let through, in the place of our attention of a Llama, and the calls that it then calls wrong.


def causal(*given: Any, **more: Any) -> tuple[Tensor, None]:
    forwards.note_call()  # or a forward without any is refused
    return AttentionInterface._global_mapping["sdpa"](*given, **more)


def a_row_off(*given: Any, position_ids: Tensor, **more: Any) -> tuple[Tensor, None]:
    return stablemask_attention(*given, position_ids=position_ids + 1, **more)


def by_slot(*given: Any, position_ids: Tensor, **more: Any) -> tuple[Tensor, None]:
    if position_ids.shape[1] > 1:
        position_ids = position_ids[:1] * 0 + position_ids.new_ones(position_ids.shape[1]).cumsum(0) - 1
    return stablemask_attention(*given, position_ids=position_ids, **more)


def foreign(*given: Any, **more: Any) -> tuple[Tensor, None]:
    raise KeyError("stablemask")


def untrue(words: str) -> Callable[..., Any]:
    """An exception of the adapter's own, from a file of that name."""
    scope: dict[str, Any] = {}
    code = f"def refuse(*given, **more): raise NotImplementedError({words!r})"
    exec(compile(code, "/sm_flex_transformers/refuse.py", "exec"), scope)
    return scope["refuse"]


@pytest.mark.parametrize(
    ("fault", "why", "calls"),
    [
        (causal, "off eq. 11", set(CALLS)),
        (a_row_off, "off eq. 11", set(CALLS)),
        (by_slot, "off eq. 11", {"cached chunks", "packing", "packing, cache"}),  # padding is told from the mask
        (foreign, "not our exception", set(CALLS)),
        (untrue("LlamaAttention has a bias on the scores (position_bias)"), "untrue words", set(CALLS)),
        (untrue("LlamaAttention is not served"), "unknown words", set(CALLS)),
    ],
)
def test_the_census_has_teeth(fault: Any, why: str, calls: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "stablemask", fault)
    outcomes = judge_type("llama")
    assert calls <= {call for call, outcome in outcomes.items() if outcome.verdict == WRONG}
    assert why in " ".join(outcomes[call].reason for call in calls)


def test_a_type_that_does_not_build_is_counted_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.helpers.census.cases.TOO_LARGE", 10)
    outcomes = judge_type("llama")
    assert verdict(outcomes) == NOT_BUILT
    assert "parameters" in outcomes["full pass"].reason
