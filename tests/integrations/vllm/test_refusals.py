"""What StableMask cannot do right in vLLM is refused when the engine starts: never served as causal attention in silence."""

# pyright: reportMissingImports=false

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

vllm: Any = pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm runs these tests")
pytestmark = pytest.mark.vllm

from transformers import AutoConfig
from vllm.config import set_current_vllm_config
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from sm_flex_vllm import refused, registry
from sm_flex_vllm.layer import StableMaskLayer
from tests.helpers import vllm_engines as engines


def config_only(folder: Path, model_type: str, architecture: str, **settings: Any) -> Path:
    """A model without weights: what is refused is refused before they are read."""
    config = AutoConfig.for_model(model_type, **settings)
    config.architectures = [architecture]
    config.stablemask = {"gamma": "headwise", "length": 64}
    config.save_pretrained(folder)
    return folder


def latent(folder: Path) -> Path:
    return config_only(
        folder, "deepseek_v2", "DeepseekV2ForCausalLM", vocab_size=512, hidden_size=256, intermediate_size=256,
        num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8, first_k_dense_replace=2, kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, n_routed_experts=4, max_position_embeddings=512,
    )  # fmt: skip


def encoder(folder: Path) -> Path:
    return config_only(
        folder, "bert", "BertModel", vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=512,
    )  # fmt: skip


def several_axes(folder: Path) -> Path:
    axes = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    return engines.edit_config(engines.save(folder), rope_parameters=axes)


def in_its_config(**stablemask: Any) -> Callable[[Path], Path]:
    return lambda folder: engines.edit_config(engines.save(folder), stablemask=stablemask)


MODELS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a negative gamma": (in_its_config(gamma=-1), "gamma.*must be >= 0"),
    "too few gammas": (in_its_config(gamma=[0.5, 0.25]), "one number for each of the model's 8 query heads"),
    "length 0": (in_its_config(length=0), "length.*at least 1"),
    "a key that is not known": (in_its_config(slope=1), "got 'slope'"),
    "a value on the CPU's kernel": (
        in_its_config(sink=1.0, sink_value=[[0.5] * 32] * 2),
        "sink_value.*CPU_ATTN does not serve it: its kernel returns no log-sum-exp",
    ),
    "latent attention": (latent, "MLA"),
    "an encoder": (encoder, "an encoder"),
    "several axes": (several_axes, "several axes"),
}


@pytest.mark.parametrize(("make", "words"), MODELS.values(), ids=MODELS)
def test_at_start(make: Callable[[Path], Path], words: str, tmp_path: Path) -> None:
    with (
        pytest.raises(Exception, match=words),
        engines.engine(make(tmp_path), load_format="dummy", max_model_len=256, block_size=None, num_gpu_blocks_override=None),
    ):
        pass


@pytest.fixture
def asking(llama: Path) -> Iterator[Any]:
    """A VllmConfig of a model with stablemask, as in force while a model is built."""
    from vllm.engine.arg_utils import EngineArgs

    load_general_plugins()
    config = EngineArgs(str(llama), skip_tokenizer_init=True, dtype="float32").create_engine_config()
    with set_current_vllm_config(config):
        yield config


BACKENDS = [name for name, backend in AttentionBackendEnum.__members__.items() if backend.value and name not in registry.SERVED]


@pytest.mark.parametrize("name", BACKENDS)
def test_every_other_backend_refuses(name: str, asking: Any) -> None:
    backend = AttentionBackendEnum[name]
    assert backend.get_path() == f"sm_flex_vllm.refused.{name}"
    module, _, stock = backend.value.rpartition(".")
    if not _imports(name):
        pytest.skip("vLLM's own class does not import on this machine")
    expected = getattr(importlib.import_module(module), stock)
    made: Any = backend.get_class()
    assert made is backend.get_class()
    assert issubclass(made, expected)
    assert made.full_cls_name() == ("sm_flex_vllm.refused", name)
    for method in ("get_impl_cls", "get_builder_cls"):
        with pytest.raises(NotImplementedError, match=f"stablemask is set, and the backend {name} does not serve it"):
            getattr(made, method)()
        with set_current_vllm_config(SimpleNamespace(model_config=None)):  # type: ignore[arg-type]
            assert outcome(made, method) == outcome(expected, method)


def outcome(backend: Any, method: str) -> Any:
    try:
        return getattr(backend, method)()
    except NotImplementedError as error:  # some of vLLM's have none
        return str(error)


def test_most_of_the_other_backends_import_here() -> None:
    """So that the test above is one."""
    names = {"TRITON_ATTN", "FLASHINFER", "TRITON_MLA", "CPU_MLA", "AMX_MLA"}
    assert names <= set(BACKENDS)
    assert sum(_imports(name) for name in names) >= 3


def _imports(name: str) -> bool:
    module = AttentionBackendEnum[name].value.rpartition(".")[0]
    if "rocm" in module or "aiter" in module:  # they load a library that ends the process on some CPUs
        return False
    try:
        importlib.import_module(module)
    except Exception:
        return False
    return True


def test_models_with_attention_of_their_own_refuse(asking: Any) -> None:
    """And for any other config they are vLLM's own: the same properties, the same arguments, the same layers."""
    from vllm.model_executor.models import openpangu, registry
    from vllm.model_executor.models.registry import ModelRegistry

    found = {name: type(model).__name__ for name, model in ModelRegistry.models.items()}
    for name in ("InklingForCausalLM", "Qwen4ExpForCausalLM", "MiniMaxM3SparseForCausalLM", "DeepseekV4ForCausalLM"):
        assert found[name] == "Refusing"
    assert found["LlamaForCausalLM"] == "_LazyRegisteredModel"
    stock, model = openpangu.PanguEmbeddedForCausalLM, ModelRegistry.models["PanguEmbeddedForCausalLM"]
    made: Any = model.load_model_cls()
    assert made is model.load_model_cls()
    assert issubclass(made, stock)
    assert registry._ModelInfo.from_model_cls(made) == registry._ModelInfo.from_model_cls(stock)
    assert inspect.signature(made.__init__) == inspect.signature(stock.__init__)
    with pytest.raises(NotImplementedError, match=r"does not serve PanguEmbeddedForCausalLM.*layers of its own"):
        made(vllm_config=asking, prefix="")
    other: Any = SimpleNamespace(model_config=None)
    for cls in (made, stock):  # both go on into vLLM's own code, which wants a whole config
        with pytest.raises(AttributeError):
            cls(vllm_config=other, prefix="")


def test_no_model_hands_its_layers_a_backend_past_the_registry() -> None:
    """Those that do so are refused: found in vLLM's own text."""
    from sm_flex_vllm import refused_models

    folder = Path(vllm.__file__).parent / "model_executor" / "models"
    found = {x.stem for x in folder.glob("*.py") if re.search(r"attn_backend=\w*Backend\b", x.read_text())}
    assert found == {"openpangu"}
    assert all(f"vllm.model_executor.models.{name}" in refused_models.MODULES for name in found)


def test_vllm_does_not_choose_a_backend_that_refuses(asking: Any) -> None:
    question = {
        "head_size": 64, "dtype": None, "kv_cache_dtype": "auto", "block_size": 32, "use_mla": False, "has_sink": False,
        "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False, "device_capability": None,
        "attn_type": "decoder",
    }  # fmt: skip
    made: Any = AttentionBackendEnum.TRITON_ATTN.get_class()
    assert "StableMask not supported" in made.validate_configuration(**question)
    with set_current_vllm_config(SimpleNamespace(model_config=None)):  # type: ignore[arg-type]
        assert "StableMask not supported" not in made.validate_configuration(**question)


def test_an_engine_on_such_a_backend(llama: Path) -> None:
    with (
        engines.backend_in_place_of_cpu_attn("sm_flex_vllm.refused.TRITON_ATTN"),
        pytest.raises(NotImplementedError, match="the backend TRITON_ATTN does not serve it"),
        engines.engine(llama),
    ):
        pass


def test_another_version_of_vllm(llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is refused for a config with stablemask, and left alone for any other."""
    load_general_plugins()
    monkeypatch.setattr(vllm, "__version_tuple__", (0, 33, 0))
    monkeypatch.setattr(registry, "STOCK", dict(registry.STOCK))
    registry.why_refused.cache_clear()
    with engines.backend_in_place_of_cpu_attn(None):
        registry.install()
        assert AttentionBackendEnum.CPU_ATTN.get_path() == "sm_flex_vllm.refused.CPU_ATTN"
        with pytest.raises(NotImplementedError, match=r"serves vLLM from 0\.32 on and before 0\.33"), engines.engine(llama):
            pass
        with engines.engine(engines.save(tmp_path, stablemask=None)) as llm:
            assert len(engines.greedy(llm, [[1, 2, 3]], 2)[0].tokens) == 2
    registry.why_refused.cache_clear()
    refused._MADE.pop("CPU_ATTN", None)


def test_another_plugin_in_the_place_of_a_backend(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_general_plugins()
    monkeypatch.setattr(registry, "STOCK", dict(registry.STOCK))
    registry.why_refused.cache_clear()
    with engines.backend_in_place_of_cpu_attn("tests.helpers.vllm_gpu_backends.FlashOnCPU"):
        registry.install()
        with pytest.raises(NotImplementedError, match="another plugin has put tests"), engines.engine(llama):
            pass
    registry.why_refused.cache_clear()
    refused._MADE.pop("CPU_ATTN", None)


def test_a_vllm_without_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm.v1.attention.backends.registry", None)
    with pytest.raises(ImportError, match="can neither serve nor refuse"):
        registry.install()


def test_layers_that_hand_their_backend_other_rows() -> None:
    """vLLM makes such a layer's backend a subclass of ours: chunked local attention, tokens before the text."""
    from vllm.v1.attention.backend import subclass_attention_backend

    from sm_flex_vllm.cpu import StableMaskCPUBackend

    class Layer(StableMaskLayer):
        num_heads = 8
        stablemask: Any = object()
        _table = None

    made = subclass_attention_backend("Chunked", StableMaskCPUBackend, StableMaskCPUBackend.get_builder_cls())
    layer = SimpleNamespace(attn_backend=made, layer_name="model.layers.0.attn")
    with pytest.raises(NotImplementedError, match="does not serve layers of the kind SimpleNamespace"):
        Layer().table(layer, None)  # type: ignore[arg-type]


def test_what_is_served_is_in_the_log_once(llama: Path, tmp_path: Path) -> None:
    """And nothing of it where a model has no stablemask."""
    import subprocess
    import sys

    for folder, times in ((llama, 1), (engines.save(tmp_path, stablemask=None), 0)):
        task = json.dumps({"folder": str(folder), "asked": [[1]], "tokens": 1, "happened": [], "settings": {}})
        found = subprocess.run(
            [sys.executable, "-m", "tests.helpers.vllm_engines"],
            input=task,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        assert (found.stdout + found.stderr).count("StableMask: 8 heads, N = 128, CPU_ATTN") == times
