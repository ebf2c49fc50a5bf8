"""From a layer's config and positions to its StableMask, which the layers of one forward share."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sm_flex import StableMask, stablemask
from sm_flex.score_mod import ScoreMod
from sm_flex_transformers import carried, keywords, settings, sharding
from sm_flex_transformers.masks import has_values

# By the position ids of a forward, of which every layer is handed the same tensor: (their version, the StableMask).
_CACHED = WeakIdKeyDictionary()


def asked(module: Any, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> settings.Settings | None:
    """What config.stablemask asks of a layer, of this rank's heads, and the model's own sinks; None for plain attention.

    Both kinds of sinks together are one: its mass is the sum of theirs.

    Raises:
        TypeError, ValueError, NotImplementedError: what does not fit the layer.
    """
    keep, heads = has_values(query), query.shape[1]
    given = settings.read(module.config, getattr(module, "layer_idx", None), query.device, keep)
    own = keywords.sink(module, kwargs, query)
    if given is None:
        return None if own is None else settings.Settings(None, 1, own)
    gamma, length, sink, sink_value = given
    if gamma is not None:
        gamma = sharding.of_own_heads(module, gamma, heads, keep)
    learned = getattr(module, carried.LEVEL, None)
    if learned is not None:
        sink, sink_value, keep = learned, getattr(module, carried.VALUE, None), False
    if sink is not None:
        sink = sharding.of_own_heads(module, sink, heads, keep)
    if sink_value is not None:
        sink_value = carried.of_own_heads(module, sink_value, query, key, value, keep)
    if own is not None:
        if sink_value is not None:
            sink_value = carried.beside(module, sink_value, sink, own)
        sink = own if sink is None else carried.together(own, sink)
    return settings.Settings(gamma, length, sink, sink_value)


def make(
    asked: settings.Settings,
    positions: Tensor | None,
    query: Tensor,
    num_keys: int,
    score_mod: ScoreMod | None = None,
) -> StableMask:
    """The StableMask of a layer, for positions (B, S), (1, S) or None. Without a gamma the sink is all the mass there is."""
    if asked.gamma is not None:
        return _make(asked, positions, score_mod)
    return _without_gamma(asked, query, num_keys, query.shape[2], score_mod)


def packed(asked: settings.Settings, positions: Tensor | None, query: Tensor, num_keys: int) -> StableMask:
    """make(), for the rows of all sequences one after another."""
    batch, _, num_queries, _ = query.shape
    if asked.sink is not None and asked.sink.dim() == 3:
        asked = asked._replace(sink=asked.sink.transpose(0, 1).flatten(1))
    if asked.gamma is None:
        return _without_gamma(asked, query, num_keys, batch * num_queries, None)
    if positions is not None:
        positions = positions.expand(batch, -1).flatten()
    return _make(asked, positions)


def _without_gamma(asked: settings.Settings, query: Tensor, num_keys: int, rows: int, score_mod: ScoreMod | None) -> StableMask:
    """The core wants to know where rows are that have more keys than queries. To a gamma of inf any place will do."""
    same = query.shape[2] == num_keys
    nowhere = None if same else torch.zeros(rows, dtype=torch.long, device=query.device)
    return stablemask(
        math.inf, length=1, positions=nowhere, score_mod=score_mod, sink=asked.sink, sink_value=asked.sink_value
    )


def cached(asked: settings.Settings, position_ids: Tensor | None, query: Tensor) -> StableMask:
    """make(), or what an earlier layer of the same forward got from it: its checks cost as much as a decode step's attention."""
    if position_ids is None or not has_values(query) or not has_values(position_ids) or position_ids.is_inference():
        return _make(asked, position_ids)
    version, mask = _CACHED.get(position_ids) or (None, None)
    if mask is None or version != position_ids._version or not _same(mask, asked, position_ids):
        mask = _make(asked._replace(sink=None, sink_value=None), position_ids)
        _CACHED[position_ids] = (position_ids._version, mask)
    if asked.sink is None:
        return mask
    # Each layer has a sink of its own, which was checked when it was read.
    return dataclasses.replace(mask, sink=asked.sink, sink_value=asked.sink_value, _copies={})


def _make(asked: settings.Settings, positions: Tensor | None, score_mod: ScoreMod | None = None) -> StableMask:
    assert asked.gamma is not None
    if positions is not None:
        positions = positions.clamp(min=0)  # some models number padding -1
        positions = positions[0] if positions.dim() == 2 and positions.shape[0] == 1 else positions
    return stablemask(
        asked.gamma, length=asked.length, positions=positions, score_mod=score_mod, sink=asked.sink, sink_value=asked.sink_value
    )


def _same(mask: StableMask, asked: settings.Settings, position_ids: Tensor) -> bool:
    # gamma is one tensor for each setting and device.
    if mask.gamma is not asked.gamma or mask.length != asked.length or mask.positions is None:
        return False
    # Not every write shows in a tensor's version; on a GPU to look at the values would be to wait for them.
    return position_ids.device.type != "cpu" or torch.equal(mask.positions, position_ids.clamp(min=0).view(mask.positions.shape))
