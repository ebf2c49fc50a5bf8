"""Trainings of torchtitan's own trainer on a CPU, as jobs of titan_driver.py, and the comparison of two of them."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import ROOT

MISSING = [name for name in ("torchtitan", "triton") if importlib.util.find_spec(name) is None]
needs_torchtitan = pytest.mark.skipif(
    bool(MISSING) or torch.__version__ < "2.14",
    reason=f"needs torchtitan, Triton and torch 2.14, got torch {torch.__version__}, missing: {', '.join(MISSING) or 'nothing'}",
)
STOCK, OURS = "torchtitan.train", "sm_flex_torchtitan.train"
STABLEMASK = ["--attn", "stablemask"]
ORACLE = "titan_oracle.oracle_attention"
TOLERANCE = 1e-4

Results = dict[str, dict[str, Any]]


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
