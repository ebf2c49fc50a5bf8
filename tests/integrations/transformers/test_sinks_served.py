"""Models with learned sinks where they are used: loaded, generating, compiled, and trained."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, OpenAIPrivacyFilterConfig, OpenAIPrivacyFilterModel, Trainer, TrainingArguments
from transformers.cache_utils import DynamicCache, StaticCache

from sm_flex_transformers import GammaSchedule, loading, sm_flex_attention
from tests.helpers.census.cases import Case
from tests.helpers.census.configs import small_config
from tests.helpers.census.probes import Float64
from tests.helpers.transformers_models import CONFIGS, LENGTH, agree, cache_name, model_of, ragged, tokens

TYPES = pytest.mark.parametrize("model_type", ["gpt_oss", "granite_swa"])
NAMES = pytest.mark.parametrize("attention", ["sm_flex", "stablemask"])


def model_with_sinks(model_type: str, attention: str) -> Any:
    model = model_of(small_config(model_type)[0], attention)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.25)
        elif name.endswith("sinks"):
            parameter.data.normal_()
    return model


@TYPES
@NAMES
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_every_cache_gives_the_rows_of_one_full_pass(model_type: str, attention: str, cache: str) -> None:
    model, ids = model_with_sinks(model_type, attention), tokens(2, 25)
    kept = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=31)
    with torch.no_grad(), Float64():
        full = model(ids, use_cache=False).logits
        parts = [model(part, **{cache_name(model): kept}).logits for part in ids.split([6, 1, 1, 9, 1, 7], dim=1)]
    agree(torch.cat(parts, 1), full)


@TYPES
@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
def test_generate_is_eager_attention_token_by_token(model_type: str, cache: str | None) -> None:
    ids, inputs = tokens(2, 9), ragged([9, 4], "left")[1]
    found = []
    for attention in ("sm_flex", "eager"):
        torch.manual_seed(3)
        model = model_with_sinks(model_type, attention)
        options: dict[str, Any] = {"use_cache": False} if cache is None else {"cache_implementation": cache}
        options |= {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0}
        with Float64():
            plain = model.generate(ids, **options)
            padded = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
        found.append(torch.cat([plain, padded]))
    assert torch.equal(*found)


def test_models_that_have_no_sdpa_are_loaded_under_both_names(tmp_path: Path) -> None:
    model, ids = model_with_sinks("gpt_oss", "sm_flex"), tokens(2, 19)  # not run before it is told to change
    assert not model._supports_sdpa
    model.save_pretrained(tmp_path)
    logits = {}
    for attention in ("eager", "sm_flex", "stablemask"):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation=attention, dtype=torch.float64, experts_implementation="eager"
        ).eval()
        assert loaded.config._attn_implementation == attention
        with torch.no_grad(), Float64():
            logits[attention] = loaded(ids).logits
            model.set_attn_implementation(attention)
            # Not to the bit: matrix products depend on where in memory the weights begin.
            torch.testing.assert_close(model(ids).logits, logits[attention], rtol=1e-12, atol=1e-12)
    agree(logits["sm_flex"], logits["eager"])
    assert (logits["stablemask"] - logits["sm_flex"]).abs().max() > 1e-2


def test_what_runs_beside_the_sinks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(loading.logger, "warning_once", heard.append)
    model_with_sinks("gpt_oss", "sm_flex")
    assert not heard  # the model's own attention is nothing to warn of
    model_with_sinks("gpt_oss", "stablemask")
    assert "this gpt_oss model has no config.stablemask: it runs head-wise beside its attention sinks" in " ".join(heard)


def test_the_schedule_takes_both_names() -> None:
    config = CONFIGS["llama"]()
    config.stablemask = None
    model = model_of(config, "sm_flex")
    GammaSchedule(5).on_train_begin(None, type("State", (), {"global_step": 0}), None, model=model)
    assert model.config.stablemask["gamma"] == [math.inf] * 6


def test_an_encoder_with_sinks_is_refused() -> None:
    config = OpenAIPrivacyFilterConfig(
        vocab_size=61, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=4, pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "sm_flex"
    with pytest.raises(NotImplementedError, match="sm_flex is causal and"):
        OpenAIPrivacyFilterModel(config)(tokens(1, 5))


@pytest.mark.parametrize(
    ("sinks", "error", "why"),
    [
        (torch.zeros(5), ValueError, r"one number for each of its 6 query heads, \(6,\), .* got \(5,\)"),
        (torch.zeros(1, 6, 1, 2), ValueError, r"for each head and row, \(1, 6, 9, 1\), got \(1, 6, 1, 2\)"),
        (torch.zeros(6, dtype=torch.long), TypeError, r"must be a floating tensor, got torch\.int64"),
        (torch.tensor([0, 0, 0, 0, 0, float("nan")]), ValueError, "below inf and not NaN, got nan"),
        (torch.tensor([0, 0, 0, 0, float("inf"), 0]), ValueError, "below inf and not NaN, got inf"),
        (torch.zeros(6, device="meta"), ValueError, "on the device of its queries, cpu, got meta"),
        (0.5, TypeError, "must be a floating tensor, got float"),
    ],
)
def test_wrong_sinks_are_refused_by_the_name_of_their_layer(sinks: Any, error: type, why: str) -> None:
    layer = model_of(CONFIGS["llama"](), "sm_flex").model.layers[1].self_attn
    q = torch.randn(1, 6, 9, 8)
    with pytest.raises(error, match=r"^LlamaAttention \(layer 1\): its attention sinks " + f".*{why}"):
        sm_flex_attention(layer, q, q, q, None, position_ids=torch.arange(9)[None], s_aux=sinks)


def test_a_sink_of_minus_inf_is_none() -> None:
    config = CONFIGS["llama"]()
    config.stablemask = None
    layer = model_of(config, "sm_flex").model.layers[1].self_attn
    q = torch.randn(1, 6, 9, 8, dtype=torch.float64)
    agree(
        sm_flex_attention(layer, q, q, q, None, s_aux=torch.full((6,), -torch.inf))[0], sm_flex_attention(layer, q, q, q, None)[0]
    )


def test_the_forward_compiles_whole(fresh_compiler: None) -> None:
    torch.manual_seed(3)
    model, ids, positions = model_with_sinks("granite_swa", "sm_flex").train(), tokens(2, 19), torch.arange(19)[None]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, model):
        model.zero_grad()
        run(ids, position_ids=positions, use_cache=False, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    agree(found[0], found[1], 1e-5)  # norms and angles are float32


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@NAMES
def test_gradient_checkpointing_changes_no_gradient(attention: str) -> None:
    case = Case("gpt_oss")
    model, ids = case.model(attention).train(), tokens(2, LENGTH)
    plain = gradients(model, ids)
    assert max(grad.abs().max() for name, grad in plain.items() if name.endswith("sinks")) > 1e-6
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # before 5.24
    enable()
    assert any(getattr(layer, "gradient_checkpointing", False) for layer in model.modules())
    agree(gradients(model, ids), plain)


def test_the_trainer_learns_the_sinks_as_eager_attention_does(tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in tokens(24, 17).tolist()]

    def train(attention: str) -> tuple[list[float], Tensor]:
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-2,
            report_to=[], use_cpu=True, save_strategy="no", seed=3, disable_tqdm=True,
        )  # fmt: skip
        torch.manual_seed(3)
        model = model_with_sinks("gpt_oss", attention).train()
        before = model.model.layers[0].self_attn.sinks.detach().clone()
        trainer = Trainer(model=model, args=args, train_dataset=data)  # pyright: ignore[reportArgumentType]
        trainer.train()
        moved = model.model.layers[0].self_attn.sinks.detach() - before
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], moved

    losses, moved = train("sm_flex")
    expected, expected_moved = train("eager")
    assert len(losses) == 4
    assert losses == pytest.approx(expected, rel=1e-3)  # the Trainer rounds what it logs
    agree(moved, expected_moved, 1e-5)
    assert moved.abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # PEFT's own
def test_peft_trains_the_sinks_beside_its_adapters() -> None:
    peft = pytest.importorskip("peft")
    found = []
    for attention in ("sm_flex", "eager"):
        torch.manual_seed(3)
        base = model_with_sinks("granite_swa", attention)
        torch.manual_seed(4)
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM", init_lora_weights=False)
        model = peft.get_peft_model(base, config).double()
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.requires_grad_()
        torch.manual_seed(5)
        found.append(gradients(model, tokens(2, LENGTH)))
    assert {name.rsplit(".", 1)[1] for name in found[0]} == {"weight", "sinks"}
    agree(found[0], found[1], 1e-5)  # norms, angles and Granite's own softmax are float32
