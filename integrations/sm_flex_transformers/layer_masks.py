"""From a layer's config and positions to its StableMask, which the layers of one forward share."""

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


def make(module: Any, positions: Tensor | None, query: Tensor, score_mod: ScoreMod | None = None) -> StableMask:
    """The StableMask of a layer, for positions (B, S), (1, S) or None."""
    return _make(_settings(module, query), positions, score_mod)


def cached(module: Any, position_ids: Tensor | None, query: Tensor) -> StableMask:
    """make(), or what an earlier layer of the same forward got from it: its checks cost as much as a decode step's attention."""
    asked = _settings(module, query)
    if position_ids is None or not has_values(query) or not has_values(position_ids) or position_ids.is_inference():
        return _make(asked, position_ids)
    version, mask = _CACHED.get(position_ids) or (None, None)
    if mask is None or version != position_ids._version or not _same(mask, asked, position_ids):
        mask = _make(asked, position_ids)
        _CACHED[position_ids] = (position_ids._version, mask)
    return mask


def _settings(module: Any, query: Tensor) -> settings.Settings:
    keep = has_values(query)
    asked = settings.read(module.config, getattr(module, "layer_idx", None), query.device, keep)
    return asked._replace(gamma=sharding.of_own_heads(module, asked.gamma, query.shape[1], keep))


def _make(asked: settings.Settings, positions: Tensor | None, score_mod: ScoreMod | None = None) -> StableMask:
    if positions is not None:
        positions = positions.clamp(min=0)  # some models number padding -1
        positions = positions[0] if positions.shape[0] == 1 else positions
    return stablemask(asked.gamma, length=asked.length, positions=positions, score_mod=score_mod)


def _same(mask: StableMask, asked: settings.Settings, position_ids: Tensor) -> bool:
    # gamma is one tensor for each setting and device.
    if mask.gamma is not asked.gamma or mask.length != asked.length or mask.positions is None:
        return False
    # Not every write shows in a tensor's version; on a GPU to look at the values would be to wait for them.
    return position_ids.device.type != "cpu" or torch.equal(mask.positions, position_ids.clamp(min=0).view(mask.positions.shape))
