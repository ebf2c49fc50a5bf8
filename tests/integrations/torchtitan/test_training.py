"""The real trainer of torchtitan on a CPU, with gloo: against the oracle, across two processes, compiled, checkpointed.

The trainings run in processes of their own (titan_driver.py), one fixture for each number of them.
"""

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sm_flex_torchtitan import train
from tests.helpers import ROOT

MISSING = [name for name in ("torchtitan", "triton") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING) or torch.__version__ < "2.14",
    reason=f"needs torchtitan, Triton and torch 2.14, got torch {torch.__version__}, missing: {', '.join(MISSING) or 'nothing'}",
)
STOCK, OURS = "torchtitan.train", "sm_flex_torchtitan.train"
STABLEMASK = ["--attn", "stablemask"]
TOLERANCE = 1e-4
DEGREE = "--parallelism.{}_degree"

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes, and the README's lines as documents, a few of them in each row of 256 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("titan")
    (folder / "tok").mkdir()
    (folder / "text").mkdir()
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(letters[-2:])
    tokenizer.save(str(folder / "tok" / "tokenizer.json"))
    (folder / "tok" / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if len(line) > 40]
    (folder / "text" / "train.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return folder


def run(folder: Path, jobs: list[dict[str, Any]], processes: int) -> list[Results]:
    """Each process's results; jobs of one name are one training of all processes."""
    name = f"of{processes}"
    (folder / f"{name}.json").write_text(json.dumps(jobs))
    env = {
        **os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "integrations", ROOT / "tests/helpers/titan"))),
        "TITAN_DATA": str(folder), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "FIRST_PORT": str(free_ports()),
    }  # fmt: skip
    started = []
    for rank in range(processes):
        command = [sys.executable, str(ROOT / "tests/helpers/titan/titan_driver.py"), f"{name}.json", name]
        with (folder / f"{name}.{rank}.log").open("w") as log:
            ranked = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(command, cwd=folder, env=ranked, stdout=log, stderr=subprocess.STDOUT))
    try:
        # Of two, one that stops leaves the other waiting.
        while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
            time.sleep(0.5)
    finally:
        for process in started:
            process.kill()
    codes = [process.wait() for process in started]  # below 0 of those that were killed
    assert not any(codes), (folder / f"{name}.{codes.index(max(codes))}.log").read_text()[-4000:]
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(processes)]


def free_ports() -> int:
    """A port that is free, as those after it probably are."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1] - 50


def job(
    name: str, program: str, *argv: str, config: str = "llama3", module: str = "", folder: str = "", both_ranks: bool = False
) -> dict[str, Any]:
    """A training of titan_configs' config, or of a module's own debug model."""
    chosen = (
        ["--module", module, "--config", f"{module}_debugmodel"] if module else ["--module", "titan_configs", "--config", config]
    )
    argv = (*chosen, "--dump_folder", f"dump/{folder or name}", *argv)
    return {"name": name, "program": program, "argv": argv, "both_ranks": both_ranks}


def override(function: str, **kwargs: Any) -> list[str]:
    return ["--override.imports", f"{function}={json.dumps(kwargs)}"]


def from_seed(folder: Path) -> list[str]:
    """Start from the stock model's weights."""
    return ["--checkpoint.enable", "--checkpoint.initial_load_path", str(folder / "dump" / "seed" / "checkpoint" / "step-0")]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Results:
    seed, oracle = from_seed(folder), "titan_oracle.oracle_attention"
    jobs = [
        job("seed", STOCK, "--checkpoint.enable", "--checkpoint.create_seed_checkpoint"),
        job("stablemask", OURS, *STABLEMASK, *seed),
        job("back in stock", STOCK, "--checkpoint.enable", folder="stablemask"),
        job("oracle", STOCK, *seed, *override(oracle, gamma="headwise")),
        job("causal", STOCK, *seed, *override(oracle, gamma=math.inf)),
        job("heavy", OURS, *STABLEMASK, "--attn.gamma", "0", "--attn.length=8192", *seed),
        job("heavy oracle", STOCK, *seed, *override(oracle, gamma=0.0, length=8192)),
        job("varlen", OURS, *STABLEMASK, *seed, config="llama3_varlen"),
        job("qwen3", OURS, *STABLEMASK, config="qwen3"),
        job("qwen3 oracle", STOCK, *override(oracle, gamma="headwise"), config="qwen3"),
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
        job("gpt_oss", OURS, *STABLEMASK, module="gpt_oss"),
        *[job(name, OURS, *STABLEMASK, module=name) for name in ("deepseek_v3", "flux")],
    ]
    return run(folder, jobs, 1)[0]


@pytest.fixture(scope="module")
def together(folder: Path, alone: Results) -> list[Results]:
    seed = from_seed(folder)
    jobs = [
        job(
            "tensor parallel", OURS, *STABLEMASK, *seed, DEGREE.format("tensor_parallel"), "2", "--debug.spmd_typechecking",
            "activation_checkpoint:full",
        ),
        job("context parallel", OURS, *STABLEMASK, *seed, DEGREE.format("context_parallel"), "2"),
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


def far_from(a: list[float], b: list[float]) -> float:
    """The largest relative difference of two lists of losses."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """The losses to a relative 1e-4, and gradient norms and parameters of the same training."""
    steps = len(a["losses"])
    assert steps > 1
    assert far_from(a["losses"], b["losses"][:steps]) < TOLERANCE
    assert far_from(a["grad_norms"], b["grad_norms"][:steps]) < 10 * TOLERANCE
    assert steps < len(b["losses"]) or a["checksum"] == pytest.approx(b["checksum"], rel=1e-5)


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
        ("tensor parallel", "stablemask"),
        ("context parallel", "stablemask"),
        ("sharded data", "both ranks"),
        ("pipeline", "stablemask"),
    ],
)
def test_two_processes_are_one(name: str, reference: str, alone: Results, together: list[Results]):
    first, last = [results[name] for results in together]
    expected = alone[reference]
    if name == "pipeline":
        # The loss is the last stage's, and each has half of the parameters.
        first = {**last, "checksum": first["checksum"] + last["checksum"]}
    assert_same(first, expected)


REFUSALS = {
    "gamma list": "gamma must have one number for each of the model's 16 query heads, got 2: [0.5, 0.25]",
    "short length": "length must be at least training.seq_len, 256, got 100: leave it out for 256",
    "deepseek_v3": "must be torchtitan's GQAttention, as in llama3 and qwen3, got torchtitan.models.deepseek_v3.model.Attention",
    "gpt_oss": "must be torchtitan's GQAttention, as in llama3 and qwen3, got torchtitan.models.gpt_oss.model.Attention",
    "flux": "must be torchtitan's GQAttention, as in llama3 and qwen3, got torchtitan.models.flux.model.layers.DoubleStreamBlock",
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
    ]
