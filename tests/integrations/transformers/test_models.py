"""Transformers models with attn_implementation="stablemask" against the same models with eq. 11 as their attention."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.data.data_collator import DataCollatorWithFlattening

from sm_flex import flex_attention, headwise_gamma, stablemask
from sm_flex_transformers import stablemask_attention
from tests.helpers.transformers_models import COMMON, CONFIGS, LENGTH, SOFT_CAPPED, agree, cache_name, model_of, ragged, tokens

# Transformers keeps RoPE's angles in float32, so a shift by the padding moves plain causal logits by 1e-6 as well.
ROPE = 1e-5
MODELS = pytest.mark.parametrize("name", list(CONFIGS))


def results(model: PreTrainedModel, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits at the real tokens, and every parameter's gradient of a fixed function of them."""
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    mask = inputs.get("attention_mask")
    logits = logits.flatten(0, 1) if mask is None else logits[mask.bool()]
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def inputs_of(kind: str) -> dict[str, Tensor]:
    if kind == "plain":
        return {"input_ids": tokens(2, LENGTH)}
    if kind == "beyond N":
        return {"input_ids": tokens(2, LENGTH + 9)}
    if kind == "packed":
        positions = torch.cat([torch.arange(n) for n in (5, 11, 3)])[None]
        return {"input_ids": tokens(1, 19), "position_ids": positions}
    return ragged([17, 5, 11], kind)[1]


@MODELS
@pytest.mark.parametrize("kind", ["plain", "beyond N", "packed", "left", "right"])
def test_logits_and_gradients_are_those_of_equation_11(name: str, kind: str) -> None:
    torch.manual_seed(1)
    inputs = inputs_of(kind)
    logits, grads = results(model_of(CONFIGS[name]()), **inputs)
    expected, expected_grads = results(model_of(CONFIGS[name](), "oracle"), **inputs)
    agree(logits, expected)
    assert set(grads) == set(expected_grads)
    for parameter, grad in grads.items():
        agree(grad, expected_grads[parameter], 1e-8)
    causal, _ = results(model_of(CONFIGS[name](), "sdpa"), **inputs)
    assert (logits - causal).abs().max() > 1e-2


@MODELS
@pytest.mark.parametrize("kind", ["left", "right"])
@pytest.mark.parametrize("default_positions", [False, True])
def test_padding_changes_nothing(name: str, kind: str, default_positions: bool) -> None:
    prompts, inputs = ragged([17, 5, 11], kind)
    if default_positions:  # 0..S-1 whatever the padding, as Transformers does
        del inputs["position_ids"]
    model = model_of(CONFIGS[name]())
    with torch.no_grad():
        logits = model(**inputs).logits
        for row, prompt in enumerate(prompts):
            agree(logits[row][inputs["attention_mask"][row].bool()], model(prompt).logits[0], ROPE)


@MODELS
@pytest.mark.parametrize("cache", [False, True])
def test_packed_rows_are_the_documents_one_by_one(name: str, cache: bool) -> None:
    """With a cache Transformers makes no mask for packed rows: what keeps the documents apart then is ours."""
    documents = [tokens(1, n) for n in (5, 11, 3)]
    positions = torch.cat([torch.arange(n) for n in (5, 11, 3)])[None]
    model = model_of(CONFIGS[name]())
    with torch.no_grad():
        packed = model(torch.cat(documents, 1), position_ids=positions, use_cache=cache).logits
        agree(packed, torch.cat([model(document).logits for document in documents], 1), ROPE)


def test_a_hole_in_the_mask_is_not_a_new_document() -> None:
    ids, mask = tokens(1, 12), torch.ones(1, 12, dtype=torch.long)
    mask[0, 5] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)  # as generate() makes them
    model = model_of(CONFIGS["llama"]())
    with torch.no_grad():
        with_hole = model(ids, attention_mask=mask, position_ids=positions).logits
        without = model(ids[mask.bool()][None]).logits
    agree(with_hole[mask.bool()][None], without, ROPE)


@MODELS
def test_chunked_prefill_is_the_full_pass(name: str) -> None:
    ids = tokens(2, LENGTH + 6)
    model = model_of(CONFIGS[name]())
    with torch.no_grad():
        full = model(ids).logits
        cache = DynamicCache(config=model.config)
        chunks = [model(chunk, **{cache_name(model): cache}).logits for chunk in ids.split([4, 9, 1, 8, 7], dim=1)]
    agree(torch.cat(chunks, 1), full)


def test_soft_capping_acts_on_the_real_scores() -> None:
    ids = tokens(2, 9)
    model = model_of(SOFT_CAPPED)
    layer = model.model.layers[1].self_attn
    q, k, v = torch.randn(3, 2, 6, 9, 8, dtype=torch.float64)
    positions = torch.arange(9)[None]
    out, _ = stablemask_attention(layer, q, k[:, :2], v[:, :2], None, scaling=0.3, softcap=2.0, position_ids=positions)
    capped = stablemask(headwise_gamma(6), length=LENGTH, score_mod=lambda score, b, h, i, j: 2 * torch.tanh(score / 2))
    agree(out.transpose(1, 2), flex_attention(q, k[:, :2], v[:, :2], score_mod=capped, scale=0.3, enable_gqa=True))
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()


def test_gamma_inf_is_the_causal_model() -> None:
    ids = tokens(2, 19)
    config = CONFIGS["llama-gqa"]()
    with torch.no_grad():
        causal = model_of(config, "sdpa")(ids).logits
        config.stablemask = {"gamma": float("inf")}
        agree(model_of(config)(ids).logits, causal)


@pytest.mark.parametrize("gamma", ["headwise", 0.5, [0.5, 0.25, 0.1, 0.01, 0.0, float("inf")]])
def test_what_is_saved_is_what_is_loaded(gamma: Any, tmp_path: Path) -> None:
    config = CONFIGS["llama-gqa"]()
    config.stablemask = {"gamma": gamma, "length": 17}
    model, ids = model_of(config), tokens(2, 19)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="stablemask", dtype=torch.float64).eval()
    assert loaded.config.stablemask == {"gamma": gamma, "length": 17}
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("write", ["add_", "data", "numpy"])
def test_position_ids_changed_in_place_are_read_anew(write: str) -> None:
    model, ids, positions = model_of(CONFIGS["llama"]()), tokens(1, 12), torch.arange(12)[None]
    with torch.no_grad():
        model(ids, position_ids=positions, use_cache=False)
        if write == "numpy":
            positions.numpy()[...] += 3  # which a tensor's version does not show
        else:
            (positions if write == "add_" else positions.data).add_(3)
        again = model(ids, position_ids=positions, use_cache=False).logits
        agree(again, model(ids, position_ids=positions.clone(), use_cache=False).logits)
        positions.data.copy_(torch.cat([torch.arange(5), torch.arange(7)]))  # and now two documents
        packed = model(ids, position_ids=positions, use_cache=False).logits
        agree(packed[:, 5:], model(ids[:, 5:]).logits, ROPE)


def test_a_tree_of_tokens_under_a_mask_of_ones_own() -> None:
    """Two branches from one root, positions 0 1 1 2 2: the user's mask says who sees whom, not the positions."""
    ids, positions = tokens(1, 6), torch.tensor([[0, 0, 1, 1, 2, 2]])
    visible = (torch.arange(6)[:, None] >= torch.arange(6)) & (torch.arange(6)[:, None] % 2 == torch.arange(6) % 2)
    model = model_of(CONFIGS["llama"]())
    with torch.no_grad():
        both = model(ids, attention_mask=visible[None, None], position_ids=positions, use_cache=False).logits
        for branch in (0, 1):
            agree(both[:, branch::2], model(ids[:, branch::2]).logits, ROPE)


def test_a_setting_changed_between_forwards_counts() -> None:
    model, ids, positions = model_of(CONFIGS["llama"]()), tokens(1, 12), torch.arange(12)[None]
    with torch.no_grad():
        model.config.stablemask = {**COMMON["stablemask"]}
        first = model(ids, position_ids=positions).logits
        model.config.stablemask["gamma"] = 0.5
        second = model(ids, position_ids=positions).logits
        model.config.stablemask = None
        model.config.max_position_embeddings = 31
        third = model(ids, position_ids=positions).logits
        model.config.max_position_embeddings = 90
        fourth = model(ids, position_ids=positions).logits
    for a, b in ((first, second), (second, third), (third, fourth)):
        assert (a - b).abs().max() > 1e-3


def test_a_layer_may_have_a_setting_of_its_own() -> None:
    ids = tokens(2, 19)

    def logits(**layers: Any) -> Tensor:
        with torch.no_grad():
            return model_of(LlamaConfig(**COMMON, **layers))(ids).logits

    same = {0: {"stablemask": COMMON["stablemask"]}, 1: {"stablemask": COMMON["stablemask"]}}
    other = {**same, 1: {"stablemask": {"gamma": 0.5, "length": LENGTH}}}
    agree(logits(per_layer_config=same), logits())
    assert (logits(per_layer_config=other) - logits()).abs().max() > 1e-3


def test_the_forward_compiles_whole(fresh_compiler: None) -> None:
    model, ids = model_of(CONFIGS["llama-gqa"]()), tokens(2, 19)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    positions = torch.arange(19)[None]
    with torch.no_grad():
        agree(compiled(ids, position_ids=positions, use_cache=False).logits, model(ids).logits)
    model.train()
    loss = compiled(ids, position_ids=positions, use_cache=False, labels=ids).loss
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    agree(grads, [p.grad for p in model.parameters() if p.grad is not None])


def test_packed_rows_stay_apart_when_compiled_with_a_cache(fresh_compiler: None) -> None:
    documents = [tokens(1, n) for n in (5, 11, 3)]
    positions = torch.cat([torch.arange(n) for n in (5, 11, 3)])[None]
    model = model_of(CONFIGS["llama"]())
    with torch.no_grad():
        packed = torch.compile(model, fullgraph=True, backend="aot_eager")(torch.cat(documents, 1), position_ids=positions)
        agree(packed.logits, torch.cat([model(document).logits for document in documents], 1), ROPE)


def test_the_trainer_packs_and_learns(tmp_path: Path) -> None:
    """Trainer on packed rows: the losses of the same run with eq. 11, and not those of causal attention."""
    data = [{"input_ids": tokens(1, n)[0].tolist()} for n in (5, 11, 3, 9, 14, 2, 7, 8) * 3]

    def losses(attention: str) -> list[float]:
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-3,
            report_to=[], use_cpu=True, save_strategy="no", seed=3, disable_tqdm=True,
        )  # fmt: skip
        model = model_of(CONFIGS["llama-gqa"](), attention).train()
        trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=DataCollatorWithFlattening())  # pyright: ignore[reportArgumentType]
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    ours = losses("stablemask")
    assert len(ours) == 4
    assert ours == pytest.approx(losses("oracle"), rel=1e-3)  # the Trainer rounds what it logs
    assert max(abs(a - b) for a, b in zip(ours, losses("sdpa"), strict=True)) > 0.05
