"""What happens where a model is built, loaded, or told to change its attention.

Transformers calls nothing of an attention implementation there, and some models never look theirs up: they would run as plain
causal models under StableMask's name. So importing this package wraps three methods of PreTrainedModel: the one that every load
goes through, set_attn_implementation, which skips it for just those models, and save_pretrained, for sinks that are learned.
For any other attention's name they do what they did.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from sm_flex_transformers import forwards, settings
from sm_flex_transformers.interface import NAMES, check_looks_up, has_sinks, name_of

logger = logging.get_logger("transformers.sm_flex")  # under the root that transformers.logging.set_verbosity() sets


def install() -> None:
    """Wraps the three methods, once."""
    if hasattr(PreTrainedModel.set_attn_implementation, "__wrapped__"):
        return
    choose = PreTrainedModel.get_correct_attn_implementation
    change = PreTrainedModel.set_attn_implementation
    save = PreTrainedModel.save_pretrained

    @functools.wraps(choose)
    def get_correct_attn_implementation(self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if requested_attention in NAMES:
            check_looks_up(type(self), requested_attention)
        chosen = choose(self, requested_attention, *args, **kwargs)
        settings.hand_down(self.config)
        if chosen in NAMES or _text_attention(self.config) in NAMES:
            forwards.watch(self)
            _check_settings(self, chosen if chosen in NAMES else _text_attention(self.config))
        else:
            _warn_if_asked(self.config)
        return chosen

    @functools.wraps(change)
    def set_attn_implementation(self: PreTrainedModel, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        if attn_implementation in NAMES:
            check_looks_up(type(self), attn_implementation)
        change(self, attn_implementation, *args, **kwargs)
        if _names_ours(attn_implementation):
            settings.hand_down(self.config)
            forwards.watch(self)
            for module in self.modules():
                if isinstance(module, PreTrainedModel) and module.config is self.config.get_text_config():
                    check_looks_up(type(module), name_of(module.config))
                    forwards.watch(module)

    @functools.wraps(save)
    def save_pretrained(self: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        from sm_flex_transformers.absorb import learned  # which reads models that this file has made ready

        learned.before_save(self, kwargs.get("state_dict"))
        return save(self, save_directory, *args, **kwargs)

    PreTrainedModel.save_pretrained = save_pretrained
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation
    PreTrainedModel.set_attn_implementation = set_attn_implementation


def _names_ours(attn_implementation: Any) -> bool:
    if isinstance(attn_implementation, Mapping):
        return any(map(_names_ours, attn_implementation.values()))
    return attn_implementation in NAMES


def _text_attention(config: Any) -> str | None:
    """Of a composite model, the attention of its text, where it has one text."""
    return getattr(getattr(config, "text_config", None), "_attn_implementation", None)


def _check_settings(model: PreTrainedModel, name: str | None) -> None:
    """A wrong setting is refused before the weights are loaded, and one that was left out is named."""
    config: Any = model.config
    if getattr(config, "is_heterogeneous", False) or not hasattr(config, "num_attention_heads"):
        return  # the layers are asked; the parts of a composite model when they are built
    if settings.of(config) is not None:
        for layer in range(getattr(config, "num_hidden_layers", None) or 1):
            settings.read(config, layer, torch.device("cpu"))
        return
    if name == "sm_flex":
        return  # the model's own attention
    beside = " beside its attention sinks" if has_sinks(type(model)) else ""
    logger.warning_once(
        f"this {config.model_type} model has no config.stablemask: it runs head-wise{beside} with N = max_position_embeddings, "
        f"{getattr(config, 'max_position_embeddings', None)}, and nothing of that is saved. Set config.stablemask = "
        '{"gamma": "headwise", "length": N}, N the training length'
    )


def _warn_if_asked(config: Any) -> None:
    """A model that was trained with StableMask and loaded without its name runs as a plain causal one."""
    # "vllm": the model runs inside vLLM, whose plugin (sm_flex_vllm) serves StableMask or refuses.
    if settings.of(config) is None or config.get_text_config()._attn_implementation in (*NAMES, "vllm"):
        return
    logger.warning_once(
        f"config.stablemask is set on this {config.model_type} model, but it is built with another attention and runs without "
        'StableMask: pass attn_implementation="stablemask"'
    )
