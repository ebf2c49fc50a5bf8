"""vLLM in several processes: two tensor parallel ranks, and the OpenAI server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm runs these tests")
pytestmark = pytest.mark.vllm

from tests.helpers import vllm_engines as engines

ROOT = Path(__file__).parents[3]
PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
MUTANT = """
import sm_flex_vllm.settings

def register():
    sm_flex_vllm.settings._tensor_parallel = lambda: (0, 2)  # every rank takes the first heads
"""


def two_ranks(llama: Path, reference: Any, environment: dict[str, str]) -> engines.Agreement:
    asked = engines.prompts()
    settings: dict[str, Any] = {"tensor_parallel_size": 2, "max_num_batched_tokens": 160}
    return engines.agreement(reference, asked, engines.greedy_in_a_process(llama, asked, 12, environment, **settings))


def test_two_ranks(llama: Path, reference: Any) -> None:
    found = two_ranks(llama, reference, PROCESSES)
    assert found.equal == len(engines.LENGTHS)
    assert found.worst < engines.CLOSE


def test_a_wrong_slice_of_heads_is_caught(llama: Path, reference: Any, tmp_path: Path) -> None:
    """The test above has power. The mutant comes as one more plugin, which vLLM loads in each of its processes."""
    (tmp_path / "mutant.py").write_text(MUTANT)
    info = tmp_path / "mutant-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mutant\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nmutant = mutant:register\n")
    found = two_ranks(llama, reference, {**PROCESSES, "PYTHONPATH": str(tmp_path)})
    assert found.equal <= 3
    assert found.worst > 0.1


@pytest.mark.vllm_all
def test_the_openai_server(llama: Path, reference: Any, tmp_path: Path) -> None:
    """Ten requests at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"-m vllm.entrypoints.openai.api_server --model {llama} --port {port} --host 127.0.0.1 --skip-tokenizer-init"
    options = "--dtype float32 --enforce-eager --max-model-len 400 --max-num-batched-tokens 160 --block-size 32 --max-num-seqs 8"
    asked = engines.prompts()
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, *command.split(), *options.split()],
            env={**os.environ, **PROCESSES},
            stdout=out,
            stderr=out,
            cwd=tmp_path,
        )
        try:
            wait_for(port, server, log)
            with ThreadPoolExecutor(len(asked)) as pool:
                answers = list(pool.map(lambda ids: complete(port, str(llama), ids), asked))
        finally:
            server.terminate()
            server.wait(60)
    found = engines.agreement(reference, asked, answers)
    assert found.equal == len(asked)
    assert found.worst < engines.CLOSE
    assert log.read_text().count("StableMask: 8 heads, N = 128, CPU_ATTN") == 1


def wait_for(port: int, server: Any, log: Path) -> None:
    for _ in range(300):
        assert server.poll() is None, log.read_text()[-5000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError(log.read_text()[-5000:])


def complete(port: int, model: str, ids: list[int]) -> engines.Answer:
    asked = {
        "model": model, "prompt": ids, "max_tokens": 12, "temperature": 0, "logprobs": 0, "ignore_eos": True,
        "return_token_ids": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        choice = json.load(response)["choices"][0]
    return engines.Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"])
