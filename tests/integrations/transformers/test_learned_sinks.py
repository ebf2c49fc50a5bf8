"""Sinks as parameters: trained, served from there, written into the config at the save and left out of the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch._C._distributed_c10d import HashStore
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from sm_flex_transformers import absorb_sinks, learn_sinks, sharding
from tests.helpers import sharded_sinks
from tests.helpers.absorbing import ROWS, causal
from tests.helpers.census.probes import Float64
from tests.helpers.sink_models import HEADS, LAYERS, gradients, setting, with_sinks
from tests.helpers.transformers_models import LENGTH, agree, tokens


def learned(value: str = "layers by key heads", attention: str = "stablemask", **more: Any) -> Any:
    model = with_sinks(setting("layers", value, **more), attention)
    learn_sinks(model)
    return model


@pytest.mark.parametrize("value", ["none", "layers by key heads", "layers by heads"])
@pytest.mark.parametrize("more", [{}, {"gamma": "headwise"}], ids=str)
def test_the_model_is_the_one_of_the_config(value: str, more: dict[str, Any]) -> None:
    ids = tokens(2, LENGTH)
    expected = gradients(with_sinks(setting("layers", value, **more)), ids)
    found = gradients(learned(value, **more), ids)
    own = {name: found.pop(name) for name in list(found) if "stablemask_sink" in name}
    agree(found, expected)
    assert len(own) == (2 if value == "none" else 4)
    assert all(grad.abs().max() > 1e-6 for grad in own.values())


def test_the_gradients_are_those_of_differences() -> None:
    model, ids = learned(), tokens(1, 11)
    weight = torch.linspace(-1, 1, 11 * 61, dtype=torch.float64).view(1, 11, 61)

    def total() -> float:
        with torch.no_grad(), Float64():
            return (model(ids, use_cache=False).logits * weight).sum().item()

    with Float64():
        found = gradients(model, ids)
    for name in ("stablemask_sink", "stablemask_sink_value"):
        x = getattr(model.model.layers[1].self_attn, name)
        at, step = (0,) * (x.dim() - 1) + (1,), 1e-5
        x.data[at] += step
        above = total()
        x.data[at] -= 2 * step
        below = total()
        x.data[at] += step
        assert found[f"model.layers.1.self_attn.{name}"][at].item() == pytest.approx((above - below) / (2 * step), rel=1e-5)


def test_trained_saved_and_loaded(tmp_path: Path) -> None:
    model, ids = causal(), tokens(4, 20)
    absorb_sinks(model, tokens(2, 30), rows=ROWS, learned=True)
    before = [row[:] for row in model.config.stablemask["sink"]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "stablemask" in name]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="stablemask", dtype=torch.float64).eval()
    now = model.model.layers[1].self_attn.stablemask_sink.tolist()
    assert again.config.stablemask["sink"][1] == now
    assert max(abs(a - b) for a, b in zip(now, before[1], strict=True)) > 1e-3
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    assert len(learn_sinks(again)) == 4
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_trainer_learns_them_and_its_checkpoint_has_them(tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in tokens(12, 17).tolist()]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_steps=2, seed=3, disable_tqdm=True,
    )  # fmt: skip
    model = learned().float()
    Trainer(model=model, args=args, train_dataset=data).train()  # pyright: ignore[reportArgumentType]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2", attn_implementation="stablemask")
    assert loaded.config.stablemask["sink"][0] == model.model.layers[0].self_attn.stablemask_sink.tolist()
    assert loaded.config.stablemask["sink"] != setting()["sink"]


def test_checkpointing_and_compiling_change_no_gradient(fresh_compiler: None) -> None:
    model, ids, places = learned().train(), tokens(2, 19), torch.arange(19)[None]
    plain = gradients(model, ids, position_ids=places)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = gradients(compiled, ids, position_ids=places)
    agree({name.removeprefix("_orig_mod."): grad for name, grad in found.items()}, plain)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # before 5.24
    enable()
    agree(gradients(model, ids, position_ids=places), plain)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # PEFT's own
def test_peft_trains_them_beside_its_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(learned(), config).double()
    for name, parameter in model.named_parameters():
        if "stablemask_sink" in name:
            parameter.requires_grad_()
    ids = tokens(2, 19)
    found = gradients(model, ids)
    assert {name.rpartition(".")[2] for name in found} == {"weight", "stablemask_sink", "stablemask_sink_value"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in found:
                parameter -= 0.01 * found[name]
        expected = model.eval()(ids).logits
    model.merge_and_unload().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="stablemask", dtype=torch.float64).eval()
    with torch.no_grad():
        agree(again(ids).logits, expected)


def test_what_cannot_be_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r'config.stablemask has no "sink" that could be learned'):
        learn_sinks(causal())
    with pytest.raises(ValueError, match="the model's sinks are parameters already"):
        learn_sinks(learned())
    monkeypatch.setattr(sharding, "place", lambda module: (0, 2))
    with pytest.raises(NotImplementedError, match="learned sinks need the whole of a layer's heads on each process"):
        learned()


def test_fsdp_trains_and_saves_them_as_one_process_does(tmp_path: Path) -> None:
    spawn(sharded_sinks.rank_main, (str(tmp_path),), nprocs=2)
    model, ids = sharded_sinks.model_with_sinks(), tokens(2, 9)
    learn_sinks(model)
    sharded_sinks.train(model.train(), ids)
    agree(torch.load(tmp_path / "trained.pt"), dict(model.state_dict()))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="stablemask", dtype=torch.float64)
    assert not [name for name in load_file(tmp_path / "saved" / "model.safetensors") if "stablemask" in name]
    agree(gradients(again, ids)["model.norm.weight"], gradients(model, ids)["model.norm.weight"])


def test_after_fsdp_they_would_be_of_each_process_alone_and_are_refused() -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="FSDP has sharded this model"):
            learn_sinks(sharded_sinks.sharded(sharded_sinks.model_with_sinks(), 1))
    finally:
        dist.destroy_process_group()


def test_of_checkpointed_layers_the_given_state_dict_is_saved_by_the_names_it_has(tmp_path: Path) -> None:
    model = learned()
    weights = {name: torch.full_like(x, 0.75) if "stablemask" in name else x for name, x in model.state_dict().items()}
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = checkpoint_wrapper(layer)
    model.save_pretrained(tmp_path, state_dict=weights)
    assert model.config.stablemask["sink"] == [[0.75] * HEADS] * LAYERS
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "stablemask" in name]
