"""From a layer's config and positions to its StableMask, which the layers of one forward share."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sm_flex import StableMask, stablemask
from sm_flex.score_mod import ScoreMod
from sm_flex_transformers import settings, sharding
from sm_flex_transformers.masks import has_values

# By the position ids of a forward, of which every layer is handed the same tensor: (their version, the StableMask).
_CACHED = WeakIdKeyDictionary()


def asked(module: Any, query: Tensor) -> settings.Settings | None:
    """What config.stablemask asks of a layer; None where it is to run without StableMask."""
    keep = has_values(query)
    given = settings.read(module.config, getattr(module, "layer_idx", None), query.device, keep)
    if given is None:
        return None
    return given._replace(gamma=sharding.of_own_heads(module, given.gamma, query.shape[1], keep))


def make(
    asked: settings.Settings | None,
    positions: Tensor | None,
    query: Tensor,
    num_keys: int,
    score_mod: ScoreMod | None = None,
    sink: Tensor | None = None,
) -> StableMask:
    """The StableMask of a layer, for positions (B, S), (1, S) or None. Without StableMask a sink is all the mass there is."""
    if asked is not None:
        return _make(asked, positions, score_mod, sink)
    return _without_gamma(query, num_keys, query.shape[2], score_mod, sink)


def packed(
    asked: settings.Settings | None, positions: Tensor | None, query: Tensor, num_keys: int, sink: Tensor | None
) -> StableMask:
    """make(), for the rows of all sequences one after another."""
    batch, _, num_queries, _ = query.shape
    if sink is not None and sink.dim() == 3:
        sink = sink.transpose(0, 1).flatten(1)
    if asked is None:
        return _without_gamma(query, num_keys, batch * num_queries, None, sink)
    if positions is not None:
        positions = positions.expand(batch, -1).flatten()
    return _make(asked, positions, sink=sink)


def _without_gamma(query: Tensor, num_keys: int, rows: int, score_mod: ScoreMod | None, sink: Tensor | None) -> StableMask:
    """The core wants to know where rows are that have more keys than queries. To a gamma of inf any place will do."""
    same = query.shape[2] == num_keys
    nowhere = None if same else torch.zeros(rows, dtype=torch.long, device=query.device)
    return stablemask(math.inf, length=1, positions=nowhere, score_mod=score_mod, sink=sink)


def cached(asked: settings.Settings, position_ids: Tensor | None, query: Tensor) -> StableMask:
    """make(), or what an earlier layer of the same forward got from it: its checks cost as much as a decode step's attention."""
    if position_ids is None or not has_values(query) or not has_values(position_ids) or position_ids.is_inference():
        return _make(asked, position_ids)
    version, mask = _CACHED.get(position_ids) or (None, None)
    if mask is None or version != position_ids._version or not _same(mask, asked, position_ids):
        mask = _make(asked, position_ids)
        _CACHED[position_ids] = (position_ids._version, mask)
    return mask


def _make(
    asked: settings.Settings, positions: Tensor | None, score_mod: ScoreMod | None = None, sink: Tensor | None = None
) -> StableMask:
    if positions is not None:
        positions = positions.clamp(min=0)  # some models number padding -1
        positions = positions[0] if positions.dim() == 2 and positions.shape[0] == 1 else positions
    return stablemask(asked.gamma, length=asked.length, positions=positions, score_mod=score_mod, sink=sink)


def _same(mask: StableMask, asked: settings.Settings, position_ids: Tensor) -> bool:
    # gamma is one tensor for each setting and device.
    if mask.gamma is not asked.gamma or mask.length != asked.length or mask.positions is None:
        return False
    # Not every write shows in a tensor's version; on a GPU to look at the values would be to wait for them.
    return position_ids.device.type != "cpu" or torch.equal(mask.positions, position_ids.clamp(min=0).view(mask.positions.shape))
