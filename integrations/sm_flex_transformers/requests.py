"""From a layer's config and positions to its StableMask, which the layers of one forward share."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sm_flex import StableMask, stablemask
from sm_flex.score_mod import ScoreMod
from sm_flex_transformers import settings


class _Shared(NamedTuple):
    """A StableMask, and what must be as it was for it to be still the right one, beside its gamma, length and positions."""

    version: int
    device: torch.device
    mask: StableMask


# By the position ids of a forward, of which every layer is handed the same tensor.
_SHARED = WeakIdKeyDictionary()


def new(module: Any, positions: Tensor | None, device: torch.device, score_mod: ScoreMod | None = None) -> StableMask:
    """The StableMask of a layer, for positions (B, S), (1, S) or None."""
    gamma, length = settings.read(module.config, getattr(module, "layer_idx", None), device)
    if positions is not None:
        positions = positions.clamp(min=0)  # some models number padding -1
        positions = positions[0] if positions.shape[0] == 1 else positions
    return stablemask(gamma, length=length, positions=positions, score_mod=score_mod)


def shared(module: Any, position_ids: Tensor | None, device: torch.device) -> StableMask:
    """new(), or what an earlier layer of the same forward got from it: its checks cost as much as a decode step's attention."""
    if position_ids is None or torch.compiler.is_compiling() or position_ids.is_inference():
        return new(module, position_ids, device)
    gamma, length = settings.read(module.config, getattr(module, "layer_idx", None), device)
    known = _SHARED.get(position_ids)
    if known is not None and known[:2] == (position_ids._version, device) and _same(known.mask, gamma, length, position_ids):
        return known.mask
    mask = new(module, position_ids, device)
    _SHARED[position_ids] = _Shared(position_ids._version, device, mask)
    return mask


def _same(mask: StableMask, gamma: Tensor, length: int, position_ids: Tensor) -> bool:
    if mask.gamma is not gamma or mask.length != length or mask.positions is None:
        return False
    # Not every write shows in a tensor's version; on a GPU to look at the values would be to wait for them.
    return position_ids.device.type != "cpu" or torch.equal(mask.positions, position_ids.clamp(min=0).view(mask.positions.shape))
