"""Whether a model looks its attention up by name. It is asked itself, by its code: there is no list of names."""

import functools
import inspect
import re
import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING

NAMES = ("stablemask", "sm_flex")  # ours: sm_flex is StableMask only where config.stablemask asks for it
LOOK_UP = "ALL_ATTENTION_FUNCTIONS.get_interface("
WINDOW = r"attention_interface\([^)]*\bsliding_window="
TABLE = "_ATTENTION_CLASSES[config._attn_implementation]"  # a class for each name that the model knows (GIT)


def name_of(config: Any) -> str:
    """Which of our names a config asks for."""
    name = getattr(config, "_attn_implementation", None)
    return name if name in NAMES else NAMES[0]


def layer_of(module: nn.Module) -> str:
    """A layer's name in an error."""
    layer = getattr(module, "layer_idx", None)
    return type(module).__name__ if layer is None else f"{type(module).__name__} (layer {layer})"


def check_looks_up(model: type[PreTrainedModel], name: str) -> None:
    if not looks_up_attention(model):
        way_out = "" if model.main_input_name == "input_ids" else f'; give it to the text alone, {{"text_config": "{name}"}}'
        raise NotImplementedError(
            f"{model.__name__} models do not use Transformers' attention interface: attn_implementation has no effect on "
            f"them, and {name} cannot serve them{way_out}"
        )


def looks_up_attention(model: type[PreTrainedModel]) -> bool:
    """Whether a model's code asks for its attention by name. One that is not Transformers' own is trusted until it has run."""
    source = _source(model) if model.__module__.startswith("transformers.") else None
    if source is None:
        return True
    if TABLE in source:
        return False
    if LOOK_UP in source or _is_composite(model):
        return True
    if not model._can_set_attn_implementation():
        return False
    # It has no attention class of its own: one that it takes from another module, or none at all, as Mamba.
    others = [x for x in (*vars(sys.modules[model.__module__]).values(), *model.__mro__) if inspect.isclass(x)]
    taken = [x for x in others if issubclass(x, nn.Module) and x.__module__ not in (model.__module__, PreTrainedModel.__module__)]
    return any(LOOK_UP in (_source(x) or "") for x in taken)


def has_sinks(model: type[PreTrainedModel]) -> bool:
    """Whether a model's code hands its attention learned sinks."""
    return re.search(r"\b(s_aux|sinks)=", _source(model) or "") is not None


@torch._dynamo.assume_constant_result
def extends_its_mask(model_type: str) -> bool:
    """Whether a model puts keys of its own behind those of its mask, and what it says of them in the mask's dtype."""
    return _extends_its_mask(model_type)


@torch._dynamo.assume_constant_result
def passes_its_window(model_type: str) -> bool:
    """Whether a model tells its attention how wide its window is, as it must for kernels that are given no mask."""
    return model_type not in _OTHERS and _passes_its_window(model_type)


@torch._dynamo.assume_constant_result
def leaves_its_window_out(code: str) -> bool:
    """Whether a layer names a window that its model never puts into a mask (OLMoE): its own attention sees every key.

    code: the name of the Python module that the layer's class stands in.
    """
    return code.startswith("transformers.") and _leaves_its_window_out(code)


@functools.cache
def tells_its_masks_positions(model_type: str) -> bool:
    """Whether a model hands its mask functions position_ids, by which Transformers keeps packed documents apart."""
    told = r'"position_ids": \w*position_ids|create_\w*mask\w*\([^)]*position_ids='
    return any(re.search(told, source) for source in _sources(model_type))


# Model types of which a model was built that is not Transformers' own, and may not say how wide its window is.
_OTHERS: set[str] = set()


def note_model(model: type[PreTrainedModel], model_type: str) -> None:
    """For a model that is built: its code counts, not that of Transformers' model of the same type."""
    if not model.__module__.startswith("transformers."):
        source = _source(model)
        if source is None or (LOOK_UP in source and not re.search(WINDOW, source)):
            _OTHERS.add(model_type)


@functools.cache
def _extends_its_mask(model_type: str) -> bool:
    return any(".to(attention_mask.dtype)" in source for source in _sources(model_type))


@functools.cache
def _passes_its_window(model_type: str) -> bool:
    sources = _sources(model_type)
    return bool(sources) and all(re.search(WINDOW, source) for source in sources)


@functools.cache
def _leaves_its_window_out(code: str) -> bool:
    source = _text(code) or ""
    made = set(re.findall(r"\bcreate_\w*mask\w*(?=\()", source))
    return re.search(WINDOW, source) is not None and made == {"create_causal_mask"}


def _sources(model_type: str) -> list[str]:
    """Of the models of a type that are Transformers' own."""
    return [_source(model) or "" for model in _models(model_type) if model.__module__.startswith("transformers.")]


def _models(model_type: str) -> list[type[PreTrainedModel]]:
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_MAPPING:
        return []
    found: Any = MODEL_MAPPING[CONFIG_MAPPING[model_type]]
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _is_composite(model: type[PreTrainedModel]) -> bool:
    """Whether its parts are models of their own, each asked when it is built."""
    config_class: Any = model.config_class
    parts = config_class.sub_configs.values() if config_class else ()
    return any(part is AutoConfig or part in MODEL_MAPPING for part in parts)


@functools.cache
def _source(model: type[nn.Module]) -> str | None:
    return _text(model.__module__)


def _text(code: str) -> str | None:
    try:
        return inspect.getsource(sys.modules[code])
    except (KeyError, OSError, TypeError):
        return None


def check_model_type(model_type: str) -> None:
    """For a config whose attention was changed behind Transformers' back: raises NotImplementedError where it has no effect."""
    if not _type_looks_up(model_type):
        raise NotImplementedError(
            f"{model_type} models do not use Transformers' attention interface: attn_implementation has no effect on them"
        )


@torch._dynamo.assume_constant_result
def _type_looks_up(model_type: str) -> bool:
    return all(map(looks_up_attention, _models(model_type)))
