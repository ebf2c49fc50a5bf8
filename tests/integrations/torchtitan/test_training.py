"""The real trainer of torchtitan on a CPU, with gloo: against the oracle, across two processes, compiled, checkpointed.

The trainings run in processes of their own (titan_driver.py), one fixture for each number of them.
"""

import math
from pathlib import Path

import pytest

from sm_flex_torchtitan import train
from tests.helpers.titan.launch import (
    ORACLE,
    OURS,
    STABLEMASK,
    STOCK,
    TOLERANCE,
    Results,
    assert_same,
    far_from,
    from_seed,
    job,
    needs_torchtitan,
    override,
    run,
)

pytestmark = needs_torchtitan
DEGREE = "--parallelism.{}_degree"


@pytest.fixture(scope="module")
def alone(folder: Path) -> Results:
    seed, learned = from_seed(folder), [*STABLEMASK, "--attn.learned", "--checkpoint.enable"]
    jobs = [
        job("seed", STOCK, "--checkpoint.enable", "--checkpoint.create_seed_checkpoint"),
        job("stablemask", OURS, *STABLEMASK, *seed),
        job("back in stock", STOCK, "--checkpoint.enable", folder="stablemask"),
        job("oracle", STOCK, *seed, *override(ORACLE, gamma="headwise")),
        job("causal", STOCK, *seed, *override(ORACLE, gamma=math.inf)),
        job("heavy", OURS, *STABLEMASK, "--attn.gamma", "0", "--attn.length=8192", *seed),
        job("heavy oracle", STOCK, *seed, *override(ORACLE, gamma=0.0, length=8192)),
        job("varlen", OURS, *STABLEMASK, *seed, config="llama3_varlen"),
        job("qwen3", OURS, *STABLEMASK, config="qwen3"),
        job("qwen3 oracle", STOCK, *override(ORACLE, gamma="headwise"), config="qwen3"),
        job("learned", OURS, *learned, "--checkpoint.interval", "2"),
        job("resumed", OURS, *learned, "--checkpoint.load_step", "2", folder="learned"),
        job("learned oracle", STOCK, *override(ORACLE, gamma="headwise", learned=True)),
        job("override", STOCK, *seed, *override("sm_flex_torchtitan.overrides.stablemask", gamma="headwise")),
        job("to varlen", OURS, "--attn", "varlen", "--training.steps", "0"),
        job("full", OURS, *STABLEMASK, *seed, "activation_checkpoint:full"),
        job("none", OURS, *STABLEMASK, *seed, "activation_checkpoint:none"),
        job("compiled", OURS, *STABLEMASK, *seed, "--training.steps", "2", "--compile.enable"),
        job("both ranks", OURS, *STABLEMASK, *seed, both_ranks=True),
        job("checkpointing", "titan_checkpointing"),
        job("overrides", "titan_overrides"),
        job("gamma list", OURS, *STABLEMASK, "--attn.gamma", "0.5,0.25"),
        job("short length", OURS, *STABLEMASK, "--attn.length=100"),
        job("nothing to learn", OURS, *STABLEMASK, "--attn.learned", "--attn.gamma", "inf"),
        job("flux", OURS, *STABLEMASK, module="flux"),
        job("to hf", OURS, *learned, "--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"),
        job("from hf", OURS, *learned, "--checkpoint.initial_load_in_hf", module="deepseek_v3"),
    ]
    return run(folder, jobs, 1)[0]


@pytest.fixture(scope="module")
def together(folder: Path, alone: Results) -> list[Results]:
    seed, step_2 = from_seed(folder), str(folder / "dump" / "learned" / "checkpoint" / "step-2")
    resumed = ["--attn.learned", "--checkpoint.enable", "--checkpoint.initial_load_path", step_2]
    resumed += ["--checkpoint.no-initial_load_model_only"]  # the optimizer and the place in the text too
    jobs = [
        job(
            "tensor parallel", OURS, *STABLEMASK, *resumed, DEGREE.format("tensor_parallel"), "2", "--debug.spmd_typechecking",
            "activation_checkpoint:full",
        ),
        job("context parallel", OURS, *STABLEMASK, *resumed, DEGREE.format("context_parallel"), "2"),
        job(
            "sharded data", OURS, *STABLEMASK, *seed, DEGREE.format("data_parallel_shard"), "2",
            "--training.local_batch_size", "1", config="llama3_varlen",
        ),
        job(
            "pipeline", OURS, *STABLEMASK, *seed, DEGREE.format("pipeline_parallel"), "2",
            "--parallelism.pipeline_parallel_schedule", "1F1B", "--parallelism.pipeline_parallel_microbatch_size", "1",
        ),
    ]  # fmt: skip
    return run(folder, jobs, 2)


@pytest.mark.parametrize("name", ["stablemask", "varlen", "override", "full", "none", "compiled"])
def test_losses_are_those_of_the_oracle(name: str, alone: Results):
    """On flex and on varlen, by the launcher and by the override, under any activation checkpointing, compiled."""
    assert_same(alone[name], alone["oracle"])


def test_gamma_length_and_grouped_heads(alone: Results):
    assert_same(alone["heavy"], alone["heavy oracle"])
    assert_same(alone["qwen3"], alone["qwen3 oracle"])


def test_plain_causal_attention_would_be_seen(alone: Results):
    """The tolerance is far below what StableMask makes of the same training: head-wise, and with the heaviest mass."""
    assert far_from(alone["causal"]["losses"], alone["stablemask"]["losses"]) > 10 * TOLERANCE
    assert far_from(alone["causal"]["losses"], alone["heavy"]["losses"]) > 100 * TOLERANCE


def test_backends(alone: Results):
    classes = {name: alone[name]["attention"] for name in ("stablemask", "override", "varlen", "to varlen")}
    flex, varlen = ["StableFlexAttention"], ["StableVarlenAttention"]
    assert classes == {"stablemask": flex, "override": flex, "varlen": varlen, "to varlen": ["VarlenAttention"]}
    # flex_flash is FlexAttention with options, which stay.
    assert alone["overrides"]["flash"] == ["StableFlexAttention.Config", [256, 128], {"BACKEND": "FLASH"}]


def test_checkpoints_are_those_of_the_stock_model(alone: Results):
    """Each training started from the stock model's; here the trained weights go back into it."""
    assert alone["back in stock"]["attention"] == ["FlexAttention"]
    assert alone["back in stock"]["keys"] == alone["stablemask"]["keys"] == alone["seed"]["keys"]
    assert alone["back in stock"]["checksum"] == alone["stablemask"]["checksum"] != alone["seed"]["checksum"]


def test_selective_checkpointing_saves_the_attention(alone: Results):
    """Flex is one region in the forward and one in the backward; packed documents count in the forward alone."""
    counts = alone["checkpointing"]["counts"]
    calls = {name: calls for name, (calls, _) in counts.items()}
    assert calls == {"selective flex": 2, "full flex": 3, "selective varlen": 1, "full varlen": 2}
    gradients = [gradient for _, gradient in counts.values()]
    assert gradients == pytest.approx([gradients[0]] * 4, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("tensor parallel", "resumed"),
        ("context parallel", "resumed"),
        ("sharded data", "both ranks"),
        ("pipeline", "stablemask"),
    ],
)
def test_two_processes_are_one(name: str, reference: str, alone: Results, together: list[Results]):
    """Under tensor and context parallelism with a learned gamma, whose parameter is sharded as the heads are, or by FSDP."""
    first, last = [results[name] for results in together]
    expected = alone[reference]
    if name == "pipeline":
        # The loss is the last stage's, and each has half of the parameters.
        first = {**last, "checksum": first["checksum"] + last["checksum"]}
    assert_same(first, expected)
    for shift, expected_shift in zip(first["gamma_shift"], expected["gamma_shift"], strict=True):
        assert shift == pytest.approx(expected_shift, abs=1e-6)


def test_a_learned_gamma_learns_as_eq_11_says(alone: Results):
    learned, oracle = alone["learned"], alone["learned oracle"]
    assert learned["losses"][0] == pytest.approx(alone["stablemask"]["losses"][0], rel=1e-6)  # it starts at the fixed gamma
    assert learned["losses"][1] != alone["stablemask"]["losses"][1]
    assert far_from(learned["losses"], oracle["losses"]) < TOLERANCE
    assert len(learned["gamma_shift"]) == 2  # layers
    for shift, expected in zip(learned["gamma_shift"], oracle["gamma_shift"], strict=True):
        assert max(map(abs, shift)) > 0.01
        assert shift == pytest.approx(expected, abs=1e-5)


def test_a_resumed_run_equals_an_unbroken_one(alone: Results):
    """The learned gamma, and the one that it counts from, are in the checkpoint; a fixed one is not."""
    learned, resumed = alone["learned"], alone["resumed"]
    assert resumed["losses"] == learned["losses"][2:]
    assert [resumed[key] for key in ("checksum", "gamma_shift")] == [learned[key] for key in ("checksum", "gamma_shift")]
    of_gamma = [f"layers.{i}.attention.inner_attention.{name}" for i in range(2) for name in ("gamma", "gamma_shift")]
    assert learned["keys"] == sorted([*alone["stablemask"]["keys"], *of_gamma])


REFUSALS = {
    "gamma list": "gamma must have one number for each of the model's 16 query heads, got 2: [0.5, 0.25]",
    "short length": "length must be at least training.seq_len, 256, got 100: leave it out for 256",
    "nothing to learn": "gamma must be above 0 and finite where it is learned, since it stays positive, got inf",
    "to hf": "--checkpoint.last_save_in_hf cannot be used with --attn.learned: what it writes would lack gamma",
    "from hf": "--checkpoint.initial_load_in_hf of deepseek_v3 cannot be used with --attn.learned: torchtitan stops at its keys",
    "flux": "the model's attention must be that of llama3 and qwen3, deepseek_v3 and kimi_k2_7, gpt_oss, muse_glimmer, qwen3_5, "
    "got torchtitan.models.flux.model.layers.DoubleStreamBlock",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_models_and_numbers_that_do_not_fit(name: str, alone: Results):
    assert alone[name] == {"exit": 2, "refusal": alone[name]["refusal"]}
    assert alone[name]["refusal"].startswith(f"{train.PROG}: error: ")
    assert alone[name]["refusal"].endswith(REFUSALS[name])


def test_kwargs_that_the_override_refuses(alone: Results):
    words = 'TypeError: gamma must be "headwise", a number or a list of numbers, got '
    below = "ValueError: gamma must be >= 0 (inf is plain causal attention), got "
    assert alone["overrides"]["said"] == [
        f"{words}'half'",
        f"{words}True",
        f"{words}[0.5, None]",
        f"{below}-1",
        f"{below}nan",
        "TypeError: length must be an int, the training length, got 2.5",
        "ValueError: length must be at least training.seq_len, 131072, got 0: leave it out for 131072",
        "ValueError: inner_attention must be one of torchtitan's flex, flex_flash, varlen, got ScaledDotProductAttention.Config",
        "TypeError: learned must be true or false, got 1",
        "ValueError: gamma must be above 0 and finite where it is learned, since it stays positive, got [0.5, 0]",
        "TypeError: positions must be those in the document, (B, L), got (1, 8, 3): 3-D ones go on varlen",
        "TypeError: out_transform is served where it applies the model's sinks, and nothing else",
    ]


def test_layers_that_predict_further_tokens_have_it_too(alone: Results):
    layers = [*[f"layers.{i}" for i in range(6)], "mtp_layers.0"]
    assert alone["overrides"]["mtp"] == [f"model_spec.model.{layer}.attention" for layer in layers]
