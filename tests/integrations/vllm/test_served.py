"""vLLM on a CPU serves what Transformers computes: prompts whole and in chunks, caches, other models and settings."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm runs these tests")
pytestmark = pytest.mark.vllm

from tests.helpers import vllm_engines as engines
from tests.helpers.vllm_engines import check


def test_whole_prompts(llama: Path, reference: Any) -> None:
    check(llama, reference)


def test_causal_attention_is_not_taken_for_it(llama: Path, reference: Any) -> None:
    """The test above has power: vLLM's own causal attention fails it by far."""
    asked = engines.prompts()
    with engines.engine(llama, hf_overrides={"stablemask": None}) as llm:
        found = engines.agreement(reference, asked, engines.greedy(llm, asked))
    assert found.equal <= 2
    assert found.worst > 1


def test_chunks(llama: Path, reference: Any) -> None:
    check(llama, reference, max_num_batched_tokens=32)


def test_cached_prefixes(llama: Path, reference: Any) -> None:
    """The second time a prompt comes, its blocks are in the cache, and the rest is prefilled behind them."""
    asked = engines.prompts((70, 129, 200))
    longer = [ids + engines.prompts((50,))[0] for ids in asked]
    with engines.engine(llama, enable_prefix_caching=True) as llm:
        first, second, third = (engines.greedy(llm, x) for x in (asked, asked, longer))
        hits = engines.counted(llm, "prefix_cache_hits")
    for ids, answers in ((asked, first), (asked, second), (longer, third)):
        found = engines.agreement(reference, ids, answers)
        assert found.equal == len(ids)
        assert found.worst < engines.CLOSE
    assert hits >= 2 * (64 + 96 + 192)


def test_preempted_requests(llama: Path, reference: Any) -> None:
    """Too few blocks for all: some requests lose theirs in the middle, and are prefilled again with what they had written."""
    asked = engines.prompts((100, 120, 127, 128))
    with engines.engine(llama, num_gpu_blocks_override=16, max_num_seqs=4) as llm:
        answers = engines.greedy(llm, asked, 60)
        preempted = engines.counted(llm, "num_preemptions")
    found = engines.agreement(reference, asked, answers)
    assert found.equal == len(asked)
    assert found.worst < engines.CLOSE
    assert preempted > 0


# Most of a row is the sink's there, so that what two float32 implementations differ by weighs more.
SMALLER = {"initializer_range": 0.1}
MODELS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "windows, a list of gammas": (
        "mistral",
        {"gamma": [0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.0], "length": 128},
        {"sliding_window": engines.WINDOW},
    ),
    "windows and soft capping": ("gemma2", {"gamma": 0.01, "length": 300}, engines.GEMMA2),
    "norms on queries and keys": ("qwen3", {"length": 64}, {}),
    "windowed and full layers": (
        "gemma3_text",
        "default",
        {"sliding_window": engines.WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "a sink per head": ("llama", {"sink": [0.5, -2.0, 3.0, 5.0, -float("inf"), 1.0, 0.0, 2.0]}, SMALLER),
    "gammas and a sink by layers": (
        "llama",
        {"gamma": "headwise", "length": 128, "sink": [[1.0] * 8, None, [3.0, 0.0, 1.0, 2.0, -1.0, 4.0, 0.5, 2.5]]},
        SMALLER,
    ),
    "gamma 0": ("llama", {"gamma": 0, "length": 4096}, {}),
    "gamma inf": ("llama", {"gamma": float("inf")}, {}),
}


@pytest.mark.parametrize(("model_type", "stablemask", "settings"), MODELS.values(), ids=MODELS)
def test_models(tmp_path: Path, model_type: str, stablemask: Any, settings: dict[str, Any]) -> None:
    check(engines.save(tmp_path, model_type, stablemask, **settings), count=10, max_num_batched_tokens=160)


def test_settings_per_layer(tmp_path: Path) -> None:
    gammas = {0: 0.3, 1: "headwise", 2: 0.02}
    own = {layer: {"stablemask": {"gamma": gamma, "length": 90 + layer}} for layer, gamma in gammas.items()}
    check(engines.save(tmp_path, stablemask=None, per_layer_config=own), count=10)
