"""Transformers' tensor parallelism, tp_plan="auto", on two processes: each rank has the gammas of its own heads."""

from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn
from transformers import GptOssConfig, LlamaConfig

from sm_flex_transformers import stablemask_attention
from tests.helpers.tensor_parallel import load, rank_main, results
from tests.helpers.transformers_models import COMMON, LENGTH, agree, config_class, model_of, tokens

HEADS: dict[str, Any] = {**COMMON, "num_attention_heads": 8, "hidden_size": 64, "vocab_size": 64}
K_AND_V = ("model.layers.*.self_attn.k_proj", "model.layers.*.self_attn.v_proj")
SINKS: dict[str, Any] = {
    **HEADS,
    "num_key_value_heads": 4,
    "layer_types": ["full_attention", "sliding_attention"],
    "sliding_window": 7,
}
SET = {
    "length": LENGTH,
    "sink": torch.linspace(-1, 3, 16).view(2, 8).tolist(),
    "sink_value": torch.linspace(-1, 1, 2 * 4 * 8).view(2, 4, 8).tolist(),  # of key heads
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**HEADS, num_key_value_heads=4),
    "gpt_oss": lambda: GptOssConfig(**SINKS, head_dim=8, num_local_experts=2, num_experts_per_tok=1),  # shards no head
    "granite_swa": lambda: config_class("granite_swa")(**SINKS),  # whose sinks come sliced
    "sinks of the config": lambda: LlamaConfig(**{**HEADS, "stablemask": SET}, num_key_value_heads=4),
    "three heads": lambda: LlamaConfig(**{**HEADS, "num_attention_heads": 3, "hidden_size": 24}),
    "one key head": lambda: LlamaConfig(**HEADS, num_key_value_heads=1),
}
PLANS = {"keys on every rank": dict.fromkeys(K_AND_V, "colwise_gather_output")}
SERVED = ["llama", "gpt_oss", "granite_swa", "sinks of the config"]

Ran = dict[str, tuple[Any, list[Any]]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """By name: what one process got, and each of two."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    torch.manual_seed(3)
    ids = tokens(2, LENGTH + 4)
    jobs = {name: {"path": str(folder / name), "ids": ids} for name in CONFIGS}
    for name, config in CONFIGS.items():
        model_of(config()).save_pretrained(folder / name)
    jobs |= {name: {**jobs["llama"], "plan": plan} for name, plan in PLANS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        spawn(rank_main, (str(folder), jobs), nprocs=2)
    both = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return {name: (results(load(str(folder / name)), ids) if name in SERVED else None, [x[name] for x in both]) for name in jobs}


@pytest.mark.parametrize("name", SERVED)
def test_two_processes_are_one(ran: Ran, name: str) -> None:
    expected, both = ran[name]
    if name == "granite_swa" and "local_params" not in str(CONFIGS[name]().base_model_tp_plan):
        assert all("its attention sinks must be one number for each of its 4 query heads" in said for said in both)
        pytest.skip("this Transformers hands a rank of Granite all sinks beside its own queries: refused")
    assert any(part.endswith("q_proj.weight") for part in expected)
    for found in both:
        assert found.keys() == expected.keys()
        for part in expected:
            agree(found[part], expected[part])


def test_the_gammas_of_other_heads_would_show() -> None:
    """What the second of two ranks would compute with the first rank's gammas."""
    model, ids = model_of(CONFIGS["llama"]()), tokens(2, LENGTH)
    with torch.no_grad():
        right = model(ids).logits
        model.config.stablemask = {"gamma": 2 * [2.0**-h for h in range(1, 5)], "length": LENGTH}
        assert (model(ids).logits - right).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("three heads", "tp_plan cannot share out the heads of model.layers.0.self_attn.q_proj, 3 in all, among 2 ranks"),
        ("one key head", "tp_plan cannot share out the heads of model.layers.0.self_attn.k_proj, 1 in all, among 2 ranks"),
        ("keys on every rank", "tp_plan shards model.layers.0.self_attn.q_proj and not its k_proj and v_proj"),
    ],
)
def test_a_plan_that_does_not_divide_the_heads_is_refused(ran: Ran, name: str, why: str) -> None:
    if name == "keys on every rank" and isinstance(ran[name][1][0], dict):
        assert torch.equal(ran[name][1][0]["logits"], ran["llama"][1][0]["logits"])
        pytest.skip("this Transformers adds a plan to the model's own, which shards the keys too")
    for said in ran[name][1]:
        assert said.startswith(why)
        assert "\n" not in said


def test_a_layer_with_other_heads_than_its_config_says_is_refused() -> None:
    layer = model_of(CONFIGS["llama"]()).model.layers[0].self_attn
    q = torch.randn(1, 4, 5, 8)
    with pytest.raises(ValueError, match="LlamaAttention has 4 query heads where its config says 8, and its weights are not"):
        stablemask_attention(layer, q, q, q, None, position_ids=torch.arange(5)[None])
