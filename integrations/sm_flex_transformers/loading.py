"""What happens where a model is built, loaded, or told to change its attention.

Transformers calls nothing of an attention implementation there, and some models never look theirs up: they would run as plain
causal models under StableMask's name. So importing this package wraps two methods of PreTrainedModel: the one that every load
goes through, and set_attn_implementation, which skips it for just those models. For any other attention's name both do what
they did.
"""

import functools
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import logging

from sm_flex_transformers import settings

NAMES = ("stablemask",)
logger = logging.get_logger(__name__)


def install() -> None:
    """Wraps the two methods, once."""
    if hasattr(PreTrainedModel.set_attn_implementation, "__wrapped__"):
        return
    choose = PreTrainedModel.get_correct_attn_implementation
    change = PreTrainedModel.set_attn_implementation

    @functools.wraps(choose)
    def get_correct_attn_implementation(self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if requested_attention in NAMES:
            _check_looks_up(type(self))
        chosen = choose(self, requested_attention, *args, **kwargs)
        settings.link_sub_configs(self.config)
        if chosen not in NAMES:
            _warn_if_asked(self.config)
        return chosen

    @functools.wraps(change)
    def set_attn_implementation(self: PreTrainedModel, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        if attn_implementation in NAMES:
            _check_looks_up(type(self))
        change(self, attn_implementation, *args, **kwargs)
        if _names_ours(attn_implementation):
            settings.link_sub_configs(self.config)
            for module in self.modules():
                if isinstance(module, PreTrainedModel) and module.config is self.config.get_text_config():
                    _check_looks_up(type(module))

    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation
    PreTrainedModel.set_attn_implementation = set_attn_implementation


def _names_ours(attn_implementation: Any) -> bool:
    if isinstance(attn_implementation, Mapping):
        return any(map(_names_ours, attn_implementation.values()))
    return attn_implementation in NAMES


def _check_looks_up(model: type[PreTrainedModel]) -> None:
    if not looks_up_attention(model):
        raise NotImplementedError(
            f"{model.__name__} does not use Transformers' attention interface: attn_implementation has no effect on it, and "
            "it would run plain causal attention under StableMask's name"
        )


def looks_up_attention(model: type[PreTrainedModel]) -> bool:
    """Whether a model's code asks for its attention by name; a model whose source cannot be read is trusted."""
    try:
        inspect.getsource(sys.modules[model.__module__])
    except (KeyError, OSError, TypeError):
        return True
    return model._can_set_attn_implementation()


def check_model_type(model_type: str) -> None:
    """For a config whose attention was changed behind Transformers' back: raises NotImplementedError where it has no effect."""
    if not _type_looks_up(model_type):
        raise NotImplementedError(
            f"{model_type} models do not use Transformers' attention interface: attn_implementation has no effect on them"
        )


@torch._dynamo.assume_constant_result
def _type_looks_up(model_type: str) -> bool:
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_MAPPING:
        return True
    found: Any = MODEL_MAPPING[CONFIG_MAPPING[model_type]]
    return all(map(looks_up_attention, found if isinstance(found, (list, tuple)) else [found]))


def _warn_if_asked(config: Any) -> None:
    """A model that was trained with StableMask and loaded without its name runs as a plain causal one."""
    if getattr(config, "stablemask", None) is None or config.get_text_config()._attn_implementation in NAMES:
        return
    logger.warning_once(
        f"config.stablemask is set on this {config.model_type} model, but it is built with another attention and runs without "
        'StableMask: pass attn_implementation="stablemask"'
    )
