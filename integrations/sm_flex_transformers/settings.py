"""config.stablemask of a model's config: {"gamma": "headwise" | number | one number per head, "length": N, "sink": ...}."""

import copy
import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sm_flex import gamma_from, length_from
from sm_flex_transformers import sinks
from sm_flex_transformers.interface import name_of

KEYS = ("gamma", "length", "sink", "sink_value")


class Settings(NamedTuple):
    """gamma, float64, 0-d or (H,), and N, the training length; a sink's level, 0-d or (H,), and value, (H, Dv) or (Hkv, Dv).

    gamma None: there is none beside the sink, and no position counts.
    """

    gamma: Tensor | None
    length: int
    sink: Tensor | None = None
    sink_value: Tensor | None = None


_KNOWN = "gamma, length, sink and sink_value"
# Composite models' configs: the setting of the whole that their text was last given.
_HANDED_DOWN = WeakIdKeyDictionary()


def of(config: Any) -> Any:
    """config.stablemask, or None. As an attribute Transformers refuses it where some layers have one of their own."""
    return vars(config).get("stablemask")


def hand_down(config: Any) -> None:
    """Gives the text of a composite model the setting of the whole. One that it has already counts until the whole's changes.

    Raises:
        ValueError: the model has several texts: set config.stablemask on the part.
    """
    whole = of(config)
    if whole is None or (config in _HANDED_DOWN and _HANDED_DOWN[config] == whole):
        return
    text = config.get_text_config()
    if text is not config and config in _HANDED_DOWN:
        text.stablemask = whole
    hand_down_first(config)
    _HANDED_DOWN[config] = copy.deepcopy(whole)


def hand_down_first(config: Any) -> None:
    """hand_down() to a text that has no setting yet, which is all that a trace may do: it compiles anew when one appears."""
    whole = of(config)
    if whole is None:
        return
    text = config.get_text_config()
    if text is not config and of(text) is None:
        text.stablemask = whole


def read(config: Any, layer: int | None, device: torch.device, keep: bool = True) -> Settings | None:
    """What config.stablemask asks for; head-wise and config.max_position_embeddings where it says nothing.

    None, no StableMask, where there is no config.stablemask and the model runs sm_flex, or a layer has no sink and no gamma.

    Where Transformers' per_layer_config gives a layer a stablemask of its own, that is what counts there. keep lets calls
    share one gamma on the device: not of a trace, which holds it as a constant, nor with fake tensors.

    Raises:
        TypeError, ValueError: naming the key, the rule, what came and the way out.
    """
    given, name, whole = of(config), name_of(config), config
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[layer]
        own = getattr(config, "stablemask", None)
        given = given if own is None else own
    if given is None:
        if name == "sm_flex":
            return None
        given = {}
    if not isinstance(given, dict):
        raise TypeError(f"config.stablemask must be a dict with the keys {_KNOWN}, got {given!r}")
    unknown = sorted(set(given) - set(KEYS))
    if unknown:
        raise ValueError(f"config.stablemask knows {_KNOWN}, got {', '.join(map(repr, unknown))}")
    heads = num_heads(config, layer)
    sink, sink_value = _sink(given, whole, layer, heads, device, keep)
    has_sink = given.get("sink") is not None
    gamma = given.get("gamma", math.inf if has_sink else "headwise")
    if has_sink and type(gamma) is float and gamma == math.inf:
        if sink is None:
            return None
        length = given.get("length")  # of which nothing depends here
        return Settings(None, 1 if length is None else _length(length, config), sink, sink_value)
    if isinstance(gamma, list):
        gamma = tuple(gamma)
    # Only plain numbers are looked up: True is 1 to a dict, and others have no hash.
    plain = all(type(x) in (int, float, str) for x in (gamma if isinstance(gamma, tuple) else (gamma,)))
    make, where = _cached_gamma if keep and plain else _gamma, ""
    if isinstance(gamma, tuple) and len(gamma) != heads and layer is not None and len(heads_of_layers(whole)) > 1:
        where = f" of layer {layer}"
    return Settings(make(gamma, heads, device, where), _length(given.get("length"), config), sink, sink_value)


def _sink(
    given: dict[str, Any], config: Any, layer: int | None, heads: int, device: torch.device, keep: bool
) -> tuple[Tensor | None, Tensor | None]:
    """config: of the whole model."""
    if given.get("sink") is None:
        if given.get("sink_value") is not None:
            raise ValueError(
                f'{sinks.SINK_VALUE} is what the mass of a sink carries, and there is no "sink": give its level too'
            )
        return None, None
    layers = getattr(config, "num_hidden_layers", None) or 1
    sink, value = sinks.level(given["sink"], layer, layers, heads, device, keep), None
    if given.get("sink_value") is not None:
        value = sinks.values(given["sink_value"], layer, layers, device, keep)
    if sink is None and value is not None:
        raise ValueError(f"{sinks.SINK_VALUE} of layer {layer} has numbers where {sinks.SINK} has None: give both, or None twice")
    return sink, value


def heads_of_layers(config: Any) -> list[int]:
    """The different numbers of query heads that a model's layers have."""
    return sorted({num_heads(config, layer) for layer in range(getattr(config, "num_hidden_layers", 1))})


def num_heads(config: Any, layer: int | None) -> int:
    """The query heads of a layer, of the config of the model or of that layer alone; on all ranks together."""
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[layer]
    if layer is not None:
        if (heads := getattr(config, "num_attention_heads_per_layer", None)) is not None:  # Laguna
            return heads[layer]
        if (heads := getattr(config, "swa_num_attention_heads", None)) is not None:  # Inkling
            return heads if "sliding" in config.layer_types[layer] else config.num_attention_heads
    return config.num_attention_heads


def length(config: Any) -> int:
    """N of a model's config."""
    return _length((of(config) or {}).get("length"), config)


def _length(length: Any, config: Any) -> int:
    if length is None:
        length = getattr(config, "max_position_embeddings", None)
        if length is None:
            raise ValueError(
                'config.stablemask has no "length" and the config no max_position_embeddings: '
                'set config.stablemask = {"length": N}, the training length'
            )
    return length_from(length, name='config.stablemask["length"]')


def _gamma(gamma: Any, num_heads: int, device: torch.device, where: str) -> Tensor:
    return gamma_from(gamma, num_heads, name=f'config.stablemask["gamma"]{where}').to(device)


_cached_gamma = lru_cache(maxsize=64)(_gamma)
