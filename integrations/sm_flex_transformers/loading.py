"""What happens where a model is built, loaded, or told to change its attention.

Transformers calls nothing of an attention implementation there, and some models never look theirs up: they would run as plain
causal models under StableMask's name. So importing this package wraps two methods of PreTrainedModel: the one that every load
goes through, and set_attn_implementation, which skips it for just those models. For any other attention's name both do what
they did.
"""

import functools
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from sm_flex_transformers import masks, settings
from sm_flex_transformers.interface import check_looks_up

NAMES = ("stablemask",)
logger = logging.get_logger("transformers.sm_flex")  # under the root that transformers.logging.set_verbosity() sets


def install() -> None:
    """Wraps the two methods, once."""
    if hasattr(PreTrainedModel.set_attn_implementation, "__wrapped__"):
        return
    choose = PreTrainedModel.get_correct_attn_implementation
    change = PreTrainedModel.set_attn_implementation

    @functools.wraps(choose)
    def get_correct_attn_implementation(self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if requested_attention in NAMES:
            check_looks_up(type(self))
        chosen = choose(self, requested_attention, *args, **kwargs)
        settings.link_sub_configs(self.config)
        if chosen in NAMES:
            _watch_positions(self)
        else:
            _warn_if_asked(self.config)
        return chosen

    @functools.wraps(change)
    def set_attn_implementation(self: PreTrainedModel, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        if attn_implementation in NAMES:
            check_looks_up(type(self))
        change(self, attn_implementation, *args, **kwargs)
        if _names_ours(attn_implementation):
            settings.link_sub_configs(self.config)
            for module in self.modules():
                if isinstance(module, PreTrainedModel) and module.config is self.config.get_text_config():
                    check_looks_up(type(module))
                    _watch_positions(module)

    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation
    PreTrainedModel.set_attn_implementation = set_attn_implementation


def _watch_positions(model: PreTrainedModel) -> None:
    """Lets the attention know which position_ids its model was called with: not every model hands them on."""
    if masks.note_position_ids not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(masks.note_position_ids, with_kwargs=True)


def _names_ours(attn_implementation: Any) -> bool:
    if isinstance(attn_implementation, Mapping):
        return any(map(_names_ours, attn_implementation.values()))
    return attn_implementation in NAMES


def _warn_if_asked(config: Any) -> None:
    """A model that was trained with StableMask and loaded without its name runs as a plain causal one."""
    if getattr(config, "stablemask", None) is None or config.get_text_config()._attn_implementation in NAMES:
        return
    logger.warning_once(
        f"config.stablemask is set on this {config.model_type} model, but it is built with another attention and runs without "
        'StableMask: pass attn_implementation="stablemask"'
    )
