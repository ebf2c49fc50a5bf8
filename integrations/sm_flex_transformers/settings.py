"""config.stablemask of a model's config: {"gamma": "headwise" | number | one number a head, "length": N}."""

import weakref
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sm_flex import gamma_from, length_from

KEYS = ("gamma", "length")


class Settings(NamedTuple):
    """gamma, float64, 0-d or (H,), and N, the training length."""

    gamma: Tensor
    length: int


# Of the configs of a composite model's parts: the config that holds each. Weakly, since that one holds the part.
_WHOLE = WeakIdKeyDictionary()


def link_sub_configs(config: Any) -> None:
    """Lets the parts of a composite config find what stands in the whole."""
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None and part is not config:
            _WHOLE[part] = weakref.ref(config)
            link_sub_configs(part)


@torch._dynamo.assume_constant_result
def _asked_of_the_whole(config: Any) -> Any:
    whole = _WHOLE[config]() if config in _WHOLE else None
    return None if whole is None else asked(whole)


def asked(config: Any) -> Any:
    """config.stablemask; where a composite model's part has none, that of the whole. None: nothing is asked."""
    own = getattr(config, "stablemask", None)
    return own if own is not None else _asked_of_the_whole(config)


def read(config: Any, layer: int | None, device: torch.device, keep: bool = True) -> Settings:
    """What config.stablemask asks for; head-wise and config.max_position_embeddings where it says nothing.

    Where Transformers' per_layer_config gives a layer a stablemask of its own, that is what counts there. keep lets calls
    share one gamma on the device: not of a trace, which holds it as a constant, nor with fake tensors.

    Raises:
        TypeError, ValueError: naming the key, the rule, what came and the way out.
    """
    whole = config
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[layer]
    given = getattr(config, "stablemask", None)
    if given is None:
        given = asked(whole) or {}
    if not isinstance(given, dict):
        raise TypeError(f"config.stablemask must be a dict with the keys gamma and length, got {given!r}")
    unknown = sorted(set(given) - set(KEYS))
    if unknown:
        raise ValueError(f"config.stablemask knows gamma and length, got {', '.join(map(repr, unknown))}")
    gamma = given.get("gamma", "headwise")
    if isinstance(gamma, list):
        gamma = tuple(gamma)
    make = _cached_gamma if keep else _gamma
    heads = getattr(config, "num_attention_heads_per_layer", None)  # Laguna
    num_heads = config.num_attention_heads if heads is None or layer is None else heads[layer]
    return Settings(make(gamma, num_heads, device), _length(given.get("length"), config))


def _length(length: Any, config: Any) -> int:
    if length is None:
        length = getattr(config, "max_position_embeddings", None)
        if length is None:
            raise ValueError(
                'config.stablemask has no "length" and the config no max_position_embeddings: '
                'set config.stablemask = {"length": N}, the training length'
            )
    return length_from(length, name='config.stablemask["length"]')


def _gamma(gamma: Any, num_heads: int, device: torch.device) -> Tensor:
    return gamma_from(gamma, num_heads, name='config.stablemask["gamma"]').to(device)


_cached_gamma = lru_cache(maxsize=64)(_gamma)
