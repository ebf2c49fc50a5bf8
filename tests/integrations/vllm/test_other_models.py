"""With the plugin loaded, a model without stablemask is served to the bit as without it."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm runs these tests")
pytestmark = pytest.mark.vllm

from sm_flex_vllm import cpu_batch
from tests.helpers import vllm_engines as engines

# gpt-oss has learned sinks, windows and full layers.
MODELS: dict[str, dict[str, Any]] = {"llama": {}, "gpt_oss": engines.GPT_OSS}


@pytest.mark.parametrize("model_type", MODELS)
def test_the_same_to_the_bit(tmp_path: Path, model_type: str) -> None:
    folder = engines.save(tmp_path, model_type, stablemask=None, **MODELS[model_type])
    asked, answers = engines.prompts((1, 33, 100, 200)), []
    for path in (None, "sm_flex_vllm.cpu.StableMaskCPUBackend"):
        with engines.backend_in_place_of_cpu_attn(path), engines.engine(folder, max_num_batched_tokens=64) as llm:
            answers.append(engines.greedy(llm, asked))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("model_type", MODELS)
def test_two_calls_are_as_near_as_a_call_for_each_row(tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call for each row, with the mass as the kernel's sinks, is eq. 11 itself. gpt-oss: the mass beside its learned sinks."""
    folder = engines.save(tmp_path, model_type, **MODELS[model_type])
    model = engines.gpt_oss_with_mass(folder) if model_type == "gpt_oss" else engines.transformers_model(folder)
    asked, worst = engines.prompts((1, 7, 100, 129, 200)), []
    for rows in (cpu_batch.FEW_ROWS, 1000):
        monkeypatch.setattr(cpu_batch, "FEW_ROWS", rows)
        with engines.engine(folder, max_num_batched_tokens=160) as llm:
            found = engines.agreement(model, asked, engines.greedy(llm, asked, 8))
        assert found.equal == len(asked)
        worst.append(found.worst)
    assert worst[0] < 1.5 * worst[1] < 1e-3
