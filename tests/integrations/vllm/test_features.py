"""What vLLM has beside plain decoding, with StableMask: drafts, adapters, bfloat16, Transformers' model code, compiled code."""

# pyright: reportMissingImports=false

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm runs these tests")
pytestmark = pytest.mark.vllm

from safetensors.torch import save_file

from tests.helpers import vllm_engines as engines


def test_drafts_by_n_grams(llama: Path, reference: Any) -> None:
    """A step verifies several rows of a request at once: their positions are those of the sequence."""
    asked = [(engines.prompts((9,))[0] * 20)[:length] for length in (60, 127, 150)] + engines.prompts((33, 200))
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    # Its numba stays in the process, and vLLM cannot start an engine beside it.
    answers = engines.greedy_in_a_process(llama, asked, 40, happened=["spec_decode_num_draft_tokens"], speculative_config=drafts)
    found = engines.agreement(reference, asked, answers)
    assert found.equal == len(asked)
    assert found.worst < engines.CLOSE


@pytest.mark.parametrize("draft", ["itself", "causal"])
def test_drafts_by_a_model(llama: Path, reference: Any, draft: str, tmp_path: Path) -> None:
    """The draft has the settings of its own config: the model itself is accepted always, its causal twin not."""
    folder = llama if draft == "itself" else engines.save(tmp_path, stablemask=None)
    asked = engines.prompts((1, 33, 127, 200))
    drafts = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3, "max_model_len": 400}
    with engines.engine(llama, speculative_config=drafts) as llm:
        answers = engines.greedy(llm, asked, 24)
        taken = engines.counted(llm, "spec_decode_num_accepted_tokens")
    found = engines.agreement(reference, asked, answers)
    assert found.equal == len(asked)
    assert found.worst < engines.CLOSE
    assert (taken > 60) == (draft == "itself")


def test_an_adapter(llama: Path, reference: Any, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    names = [f"model.layers.{i}.self_attn.{x}" for i in range(3) for x in ("q_proj", "v_proj")]
    torch.manual_seed(0)
    weights, model = {}, engines.transformers_model(llama)
    for name in names:
        weight = model.get_submodule(name).weight
        a, b = torch.randn(8, weight.shape[1]) * 0.1, torch.randn(weight.shape[0], 8) * 0.1
        weights |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        weight.data += 2 * b @ a
    save_file(weights, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    asked = engines.prompts((1, 33, 100, 200))
    with engines.engine(llama, enable_lora=True, max_lora_rank=8) as llm:
        answers = engines.greedy(llm, asked, 10, lora_request=LoRARequest("adapter", 1, str(tmp_path)))
        without = engines.greedy(llm, asked, 10)
    for expected, got in ((model, answers), (reference, without)):
        found = engines.agreement(expected, asked, got)
        assert found.equal == len(asked)
        assert found.worst < engines.CLOSE
    assert answers != without


def test_bfloat16_loses_what_vllms_own_loses(llama: Path, reference: Any, tmp_path: Path) -> None:
    asked = engines.prompts()
    causal = engines.save(tmp_path, stablemask=None)
    worst = {}
    for folder, model in ((llama, reference), (causal, engines.transformers_model(causal, "sdpa"))):
        with engines.engine(folder, dtype="bfloat16", max_num_batched_tokens=160) as llm:
            worst[folder] = engines.agreement(model, asked, engines.greedy(llm, asked, 1)).worst
    assert worst[llama] < 2 * worst[causal]


@pytest.mark.parametrize("settings", [{"model_impl": "transformers"}, {"enforce_eager": False}], ids=["transformers", "compiled"])
@pytest.mark.vllm_all
def test_other_model_code(llama: Path, reference: Any, settings: dict[str, Any]) -> None:
    """Transformers' own layers, for which vLLM changes Transformers' classes in the process, and layers compiled by inductor."""
    asked = engines.prompts()
    found = engines.agreement(reference, asked, engines.greedy_in_a_process(llama, asked, 8, **settings))
    assert found.equal == len(asked)
    assert found.worst < engines.CLOSE


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's fp8 cache wants AVX-512 or AMX")
def test_an_fp8_cache_is_as_good_as_vllms_own(llama: Path, reference: Any, tmp_path: Path) -> None:
    """The cache is rounded, so the answer is that of rounded keys: as far from the exact one as causal attention's."""
    asked = engines.prompts((33, 100, 200))
    causal = engines.save(tmp_path, stablemask=None)
    worst = {}
    for folder, model in ((llama, reference), (causal, engines.transformers_model(causal, "sdpa"))):
        with engines.engine(folder, kv_cache_dtype="fp8", max_num_batched_tokens=64) as llm:
            worst[folder] = engines.agreement(model, asked, engines.greedy(llm, asked, 1)).worst
    assert worst[llama] < 2 * worst[causal]
