"""The plumbing of the two GPU backends, run on a CPU: settings, positions, tables, epilogue. Their kernels have not run here."""

# pyright: reportMissingImports=false

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
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


def test_windows_and_soft_capping(tmp_path: Path, backend: str) -> None:
    if backend == "FlexOnCPU":
        pytest.skip("vLLM's FlexAttention has no soft capping")
    engines.check(engines.save(tmp_path, "gemma2", **engines.GEMMA2), count=8)


def test_learned_sinks(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention: mass beside M. FlexAttention has none, and would drop them in silence."""
    folder = engines.save(tmp_path, "gpt_oss", **engines.GPT_OSS)
    if backend == "FlexOnCPU":
        with pytest.raises(NotImplementedError, match="FLEX_ATTENTION has no learned sinks"), engines.engine(folder):
            pass
        return
    from vllm.v1.attention.backends import flash_attn

    monkeypatch.setattr(flash_attn, "flash_attn_supports_sinks", lambda: True, raising=False)
    engines.check(folder, engines.gpt_oss_with_mass(folder), count=8, lengths=(1, 7, 100, 129, 200))


SINKS = {
    "a value per query head": {"sink": [0.5, -2.0, 3.0, 5.0, -1.0, 1.0, 0.0, 2.0], "sink_value": engines.numbers(3, 8, 32)},
    "a value per key head, beside gammas": {
        "gamma": "headwise",
        "sink": engines.numbers(3, 8),
        "sink_value": engines.numbers(3, 2, 32),
    },
}


@pytest.mark.parametrize("stablemask", SINKS.values(), ids=SINKS)
def test_sinks_with_values(tmp_path: Path, backend: str, stablemask: dict[str, Any]) -> None:
    """As in Transformers, to the token. The same engine without the value is far off."""
    folder = engines.save(tmp_path, stablemask={**stablemask, "length": engines.N})
    engines.check(folder, max_num_batched_tokens=160)
    without = {**stablemask, "length": engines.N, "sink_value": None}
    asked, model = engines.prompts(), engines.transformers_model(folder)
    with engines.engine(folder, hf_overrides={"stablemask": without}) as llm:
        found = engines.agreement(model, asked, engines.greedy(llm, asked))
    assert found.worst > 0.1


def test_a_value_of_another_size(tmp_path: Path, backend: str) -> None:
    folder = engines.save(tmp_path, stablemask={"sink": 1.0, "sink_value": engines.numbers(2, 16)})
    with pytest.raises(ValueError, match="must have 32 numbers for each"), engines.engine(folder):
        pass


def test_flash_on_rocm(llama: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel there takes other arguments: refused at start, where vLLM's own would fail at the first request."""
    if backend == "FlexOnCPU":
        pytest.skip("FlexAttention is the same everywhere")
    monkeypatch.setattr("sm_flex_vllm.flash.current_platform", SimpleNamespace(is_rocm=lambda: True))
    with pytest.raises(NotImplementedError, match="does not serve it on ROCm"), engines.engine(llama):
        pass
