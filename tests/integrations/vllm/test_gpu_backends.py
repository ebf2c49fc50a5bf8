"""The plumbing of the two GPU backends, run on a CPU: settings, positions, tables, epilogue. Their kernels have not run here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm runs these tests")
pytestmark = pytest.mark.vllm

from tests.helpers import vllm_engines as engines


@pytest.fixture(params=["FlexOnCPU", "FlashOnCPU"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with engines.backend_in_place_of_cpu_attn(f"tests.helpers.vllm_gpu_backends.{request.param}"):
        torch.compiler.set_stance("force_eager")  # inductor's kernel for CPUs returns no log-sum-exp
        yield request.param
        torch.compiler.set_stance("default")


@pytest.mark.parametrize("tokens", [512, 32], ids=["whole", "chunks"])
def test_served(backend: str, tokens: int, llama: Path, reference: Any) -> None:
    engines.check(llama, reference, max_num_batched_tokens=tokens)


def test_flash_with_windows_soft_capping_and_sinks(tmp_path: Path, backend: str) -> None:
    if backend == "FlexOnCPU":
        pytest.skip("vLLM's FlexAttention has neither soft capping nor sinks")
    engines.check(engines.save(tmp_path, "gemma2", **engines.GEMMA2), count=8)
