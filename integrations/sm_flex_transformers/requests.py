"""From a layer's config and positions to its StableMask, which the layers of one forward share."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sm_flex import StableMask, stablemask
from sm_flex.score_mod import ScoreMod
from sm_flex_transformers import settings


class _Shared(NamedTuple):
    """A StableMask, and what must be as it was for it to be still the right one."""

    version: int
    config: Any
    setting: Any
    device: torch.device
    mask: StableMask


# By the position ids of a forward, of which every layer is handed the same tensor.
_SHARED = WeakIdKeyDictionary()


def new(module: Any, positions: Tensor | None, device: torch.device, score_mod: ScoreMod | None = None) -> StableMask:
    """The StableMask of a layer, for positions (B, S), (1, S) or None."""
    gamma, length = settings.read(module.config, getattr(module, "layer_idx", None), device)
    if positions is not None and positions.shape[0] == 1:
        positions = positions[0]
    return stablemask(gamma, length=length, positions=positions, score_mod=score_mod)


def shared(module: Any, position_ids: Tensor | None, device: torch.device) -> StableMask:
    """new(), or what an earlier layer of the same forward got from it: its checks cost as much as a decode step's attention."""
    config = module.config
    if position_ids is None or torch.compiler.is_compiling() or position_ids.is_inference() or config.is_heterogeneous:
        return new(module, position_ids, device)
    setting = getattr(config, "stablemask", None)
    known = _SHARED.get(position_ids)
    if known is None or known[:4] != (position_ids._version, config, setting, device):
        mask = new(module, position_ids.clone(), device)  # a key must not be held by its own value
        known = _Shared(position_ids._version, config, copy.deepcopy(setting), device, mask)
        _SHARED[position_ids] = known
    return known.mask
