"""config.stablemask["sink"]: eq. 11 with that sink on every route of the adapter, saved with the config, refused in words."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.cache_utils import DynamicCache, StaticCache

from sm_flex_transformers import settings, sinks
from tests.helpers.sink_models import HEADS, LAYERS, SINKS, gradients, setting, with_sinks
from tests.helpers.transformers_models import COMMON, LENGTH, agree, cache_name, model_of, ragged, tokens
from tests.integrations.transformers.test_continuous_batching import alone, batched, served

NAMES = pytest.mark.parametrize("attention", ["stablemask", "sm_flex"])
FORMS = [("number", "none"), ("heads", "key heads"), ("layers", "layers by heads")]


@NAMES
@pytest.mark.parametrize(("sink", "value"), FORMS)
@pytest.mark.parametrize("more", [{}, {"gamma": float("inf")}, {"gamma": "headwise"}, {"gamma": 0.25}], ids=str)
def test_a_forward_and_its_gradients_are_equation_11(attention: str, sink: str, value: str, more: dict[str, Any]) -> None:
    given, ids = setting(sink, value, **more), tokens(2, LENGTH + 4)
    ours, expected = with_sinks(given, attention), with_sinks(given, "sink_oracle")
    agree(gradients(ours, ids), gradients(expected, ids))
    with torch.no_grad():
        assert (ours(ids).logits - with_sinks({**given, "sink": -torch.inf}, attention)(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize(("sink", "value"), FORMS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(sink: str, value: str, side: str) -> None:
    prompts, inputs = ragged([11, 4, 7], side)
    model = with_sinks(setting(sink, value, gamma="headwise"))
    with torch.no_grad():
        together = model(**inputs).logits
        for row, prompt in enumerate(prompts):
            agree(together[row][inputs["attention_mask"][row].bool()], model(prompt).logits[0])


@pytest.mark.parametrize(("sink", "value"), FORMS)
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("more", [{}, {"gamma": "headwise"}], ids=str)
def test_packed_rows(sink: str, value: str, use_cache: bool, more: dict[str, Any]) -> None:
    prompts = [tokens(1, n) for n in (9, 3, 11)]
    places = torch.cat([torch.arange(prompt.shape[1]) for prompt in prompts])[None]
    model = with_sinks(setting(sink, value, **more))
    with torch.no_grad():
        together = model(torch.cat(prompts, 1), position_ids=places, use_cache=use_cache).logits
        agree(together, torch.cat([model(prompt).logits for prompt in prompts], 1))


@NAMES
@pytest.mark.parametrize(("sink", "value"), FORMS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gemma3"])
def test_every_cache_gives_the_rows_of_one_full_pass(attention: str, sink: str, value: str, cache: str, name: str) -> None:
    if name == "mistral" and "key" in value:
        pytest.skip("it has other key heads")
    model, ids = with_sinks(setting(sink, value), attention, name), tokens(2, LENGTH)
    kept = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=31)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        parts = [model(part, **{cache_name(model): kept}).logits for part in ids.split([6, 1, 1, 8, 1, 6], dim=1)]
        agree(torch.cat(parts, 1), full, 1e-6 if name == "gemma3" else 1e-9)  # Gemma's norms are float32
        agree(full, with_sinks(setting(sink, value), "sink_oracle", name)(ids, use_cache=False).logits, 1e-6)


@pytest.mark.parametrize(("sink", "value"), FORMS)
@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
def test_generate_is_equation_11_token_by_token(sink: str, value: str, cache: str | None) -> None:
    inputs = ragged([9, 4], "left")[1]
    options: dict[str, Any] = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    options |= {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    found = [
        with_sinks(setting(sink, value), attention).generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], **options
        )
        for attention in ("stablemask", "sink_oracle")
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize(("sink", "value"), FORMS)
@pytest.mark.parametrize("more", [{}, {"gamma": "headwise"}], ids=str)
def test_the_forward_compiles_whole(sink: str, value: str, more: dict[str, Any], fresh_compiler: None) -> None:
    model, ids, places = with_sinks(setting(sink, value, **more)), tokens(2, 19), torch.arange(19)[None]
    expected = gradients(model, ids, position_ids=places)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = gradients(compiled, ids, position_ids=places)
    agree({name.removeprefix("_orig_mod."): grad for name, grad in found.items()}, expected)


@pytest.mark.parametrize(("sink", "value"), FORMS)
def test_checkpointing_changes_no_gradient(sink: str, value: str) -> None:
    model, ids = with_sinks(setting(sink, value)).train(), tokens(2, LENGTH)
    plain = gradients(model, ids)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # before 5.24
    enable()
    agree(gradients(model, ids), plain)


@NAMES
@pytest.mark.parametrize(("sink", "value"), FORMS)
def test_saved_with_the_config_to_the_bit(tmp_path: Path, attention: str, sink: str, value: str) -> None:
    given, ids = setting(sink, value), tokens(2, 9)
    model = with_sinks(given, attention)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention, dtype=torch.float64).eval()
    assert again.config.stablemask == given
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("sink", "value"), FORMS)
def test_beside_a_models_own_sinks_is_the_mass_of_both(sink: str, value: str) -> None:
    given, ids = setting(sink, value), tokens(2, LENGTH)
    found = []
    for attention in ("sm_flex", "sink_oracle"):
        model = own_sinks(given, attention)
        found.append(gradients(model, ids))
    agree(*found, 1e-5)  # pyright: ignore[reportCallIssue]


def own_sinks(given: dict[str, Any], attention: str) -> Any:
    config = GptOssConfig(
        **{**COMMON, "stablemask": given}, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        sliding_window=7, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = model_of(config, attention)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(std=1.0 if name.endswith("sinks") else 0.25)
    return model


def test_a_layer_without_a_sink_is_plain(fresh_compiler: None) -> None:
    model, ids = with_sinks({"length": LENGTH, "sink": [None, SINKS["heads"]]}), tokens(2, 9)
    expected = with_sinks({"length": LENGTH, "gamma": float("inf"), "sink": [[-torch.inf] * HEADS, SINKS["heads"]]})
    with torch.no_grad():
        agree(model(ids).logits, expected(ids).logits)


def test_a_layer_of_its_own_setting() -> None:
    own = {i: {"stablemask": {"length": LENGTH, "sink": SINKS["layers"][i]}} for i in range(LAYERS)}
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = with_sinks(setting("layers"))(ids).logits
        agree(with_sinks(None, per_layer_config=own)(ids).logits, expected)


@pytest.mark.parametrize("sink", ["heads", "layers"])
def test_a_change_in_the_config_counts_at_once(sink: str) -> None:
    model, ids = with_sinks(setting(sink)), tokens(2, 9)
    with torch.no_grad():
        before = model(ids).logits
        row = model.config.stablemask["sink"]
        (row if sink == "heads" else row[1])[2] += 1.0
        after = model(ids).logits
        fresh = with_sinks(dict(model.config.stablemask))(ids).logits
        (row if sink == "heads" else row[1])[2] -= 1.0
    assert torch.equal(after, fresh)
    assert (after - before).abs().max() > 1e-3


def test_a_layers_tensor_is_made_once() -> None:
    config = with_sinks(setting("layers")).config
    cpu = torch.device("cpu")
    found = [[settings.read(config, layer, cpu) for layer in range(LAYERS)] for _ in range(2)]
    assert all(a is not None and b is not None and a.sink is b.sink for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("sink", "error", "why"),
    [
        ([0.0] * 5, ValueError, r'"sink"\] must have one number for each of the 6 query heads, got 5'),
        ([[0.0] * 6], ValueError, r"must have one entry for each of the model's 2 layers, got 1"),
        ([[0.0] * 6, [0.0] * 4], ValueError, r'"sink"\] of layer 1 must have one number for each of the 6 query heads, got 4'),
        ([[0.0] * 6, 1.0], TypeError, r'"sink"\] of layer 1 must be a list with one number per query head, or None, got 1.0'),
        (float("inf"), ValueError, r"must be below inf and not NaN, the log of a mass \(-inf is none\), got inf"),
        ([0.0] * 5 + [float("nan")], ValueError, "must be below inf and not NaN, .* got nan"),
        ([0.0] * 5 + [True], TypeError, "one number per query head, or one such list for each layer, got .*True"),
        (True, TypeError, "must be a number, .* got True"),
        ("matched", TypeError, "must be a number, .* got 'matched'"),
        (10**400, ValueError, "got an int of 401 digits"),
    ],
)
def test_a_wrong_sink(sink: Any, error: type, why: str) -> None:
    with pytest.raises(error, match=why):
        with_sinks({"length": LENGTH, "sink": sink})(tokens(1, 5))


def test_a_list_by_layers_needs_a_layer_that_knows_its_number() -> None:
    with pytest.raises(ValueError, match=r"list by layers, and the layer does not know its number \(layer_idx\)"):
        sinks.level(SINKS["layers"], None, LAYERS, HEADS, torch.device("cpu"), True)


@pytest.mark.parametrize(
    ("value", "error", "why"),
    [
        ([[0.0] * 8] * 3, ValueError, r'"sink_value"\] must be 6 \(query heads\) or 2 \(key heads\) by 8 numbers, .* got 3 by 8'),
        ([[0.0] * 7] * 2, ValueError, r"by 8 numbers, its value head dim, got 2 by 7"),
        ([[[0.0] * 8] * 2], ValueError, r'"sink_value"\] must have one entry for each of the model\'s 2 layers, got 1'),
        ([[[0.0] * 8] * 2, None], None, ""),
        ([None, [0.0] * 8], TypeError, r'"sink_value"\] of layer 1 must have Dv numbers for each query or key head'),
        ([[0.0] * 8, [0.0] * 7], ValueError, "the same Dv for all, got 7 and 8 numbers"),
        ([[0.0] * 7 + [float("nan")]] * 2, ValueError, "must be finite, got nan"),
        ([["0"] * 8] * 2, TypeError, "must have Dv numbers for each query or key head, got"),
        ([0.0] * 8, TypeError, "must have Dv numbers for each query or key head, or one such list for each layer, got"),
        (0.5, TypeError, "must be a list with Dv numbers for each query or key head, or one such list for each layer, got 0.5"),
    ],
)
def test_a_wrong_value(value: Any, error: Any, why: str) -> None:
    given = {"length": LENGTH, "sink": SINKS["layers"], "sink_value": value}
    if error is None:
        with_sinks(given)(tokens(1, 5))
        return
    with pytest.raises(error, match=why):
        with_sinks(given)(tokens(1, 5))


def test_a_value_without_a_sink() -> None:
    with pytest.raises(ValueError, match=r'"sink_value".* is what the mass of a sink carries, and there is no "sink"'):
        with_sinks({"length": LENGTH, "sink_value": [[0.0] * 8] * 2})(tokens(1, 5))
    with pytest.raises(ValueError, match=r'"sink_value"\] of layer 0 has numbers where .* has None: give both, or None twice'):
        with_sinks({"length": LENGTH, "sink": [None, SINKS["heads"]], "sink_value": [[[0.0] * 8] * 2] * 2})(tokens(1, 5))


@pytest.mark.parametrize("more", [{}, {"gamma": "headwise"}], ids=str)
def test_in_bfloat16_it_is_as_near_to_float64_as_without(more: dict[str, Any]) -> None:
    ids = tokens(2, LENGTH)
    plain = {"length": LENGTH, "gamma": torch.inf}
    with torch.no_grad():
        error = {}
        for name, given in (("with", setting("layers", "layers by heads", **more)), ("without", plain)):
            exact = with_sinks(given)(ids).logits
            error[name] = (with_sinks(given).bfloat16()(ids).logits.double() - exact).abs().mean()
    assert error["with"] <= 2 * error["without"]


@served
def test_continuous_batching_gives_what_generate_gives() -> None:
    model, prompts = with_sinks(setting("layers", "layers by heads")), [tokens(1, n) for n in (9, 1, LENGTH + 4, 14)]
    requests = batched(model, prompts)
    assert [request.error for request in requests] == [None] * 4
    assert [request.generated_tokens for request in requests] == [alone(model, prompt) for prompt in prompts]


@pytest.mark.parametrize(("sink", "value"), FORMS)
@pytest.mark.parametrize("more", [{}, {"gamma": 0.25}], ids=str)
def test_a_model_trains_after_it_ran_in_inference_mode(sink: str, value: str, more: dict[str, Any]) -> None:
    given, ids = setting(sink, value, **more), tokens(2, LENGTH)
    expected = gradients(with_sinks(given), ids)
    sinks._KEPT.clear()
    sinks._kept_number.cache_clear()
    with torch.inference_mode():
        with_sinks(given)(ids)
    agree(gradients(with_sinks(given), ids), expected)
