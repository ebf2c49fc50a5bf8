"""With the plugin loaded, a model without stablemask is served to the bit as without it."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm runs these tests")
pytestmark = pytest.mark.vllm

from tests.helpers import vllm_engines as engines

GPT_OSS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": engines.WINDOW,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
# gpt-oss has learned sinks, windows and full layers.
MODELS: dict[str, dict[str, Any]] = {"llama": {}, "gpt_oss": GPT_OSS}


@pytest.mark.parametrize("model_type", MODELS)
def test_the_same_to_the_bit(tmp_path: Path, model_type: str) -> None:
    folder = engines.save(tmp_path, model_type, stablemask=None, **MODELS[model_type])
    asked, answers = engines.prompts((1, 33, 100, 200)), []
    for path in (None, "sm_flex_vllm.cpu.StableMaskCPUBackend"):
        with engines.backend_in_place_of_cpu_attn(path), engines.engine(folder, max_num_batched_tokens=64) as llm:
            answers.append(engines.greedy(llm, asked))
    assert answers[0] == answers[1]


def test_learned_sinks_beside_gamma(tmp_path: Path) -> None:
    """gpt-oss with stablemask: the mass of both, as its own attention would have it were its sinks those of each row."""
    folder = engines.save(tmp_path, "gpt_oss", stablemask="default", **GPT_OSS)
    model = engines.gpt_oss_with_mass(folder)
    engines.check(folder, model, count=8, lengths=(1, 7, 100, 129, 200), max_num_batched_tokens=160)
