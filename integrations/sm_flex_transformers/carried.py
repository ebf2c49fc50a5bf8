"""What the mass of a layer's sink carries, and that mass beside a model's own sinks.

H query heads of this rank, Hkv key heads, Dv value head dim.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sm_flex_transformers import settings, sharding, sinks
from sm_flex_transformers.interface import layer_of

# What learned sinks are called where they are parameters of an attention layer (absorb/learned.py).
LEVEL, VALUE = "stablemask_sink", "stablemask_sink_value"
_EXPANDED = WeakIdKeyDictionary()  # values as they were read: by (heads of the layer, dtype), those of each query head


def of_own_heads(module: Any, given: Tensor, query: Tensor, key: Tensor, value: Tensor, keep: bool) -> Tensor:
    """(H, Dv) of this rank's query heads, in the dtype of the scores, from those of all query heads or of all key heads.

    keep lets the calls of a layer share one tensor.

    Raises:
        ValueError: of another number of heads, or another Dv than the layer's values.
    """
    heads = settings.num_heads(module.config, getattr(module, "layer_idx", None))
    key_heads = key.shape[1] * (heads // query.shape[1])
    # A model may hand its attention keys that it has repeated for each query head.
    allowed = {heads, key_heads, getattr(module.config, "num_key_value_heads", None) or heads}
    if given.shape[0] not in allowed or heads % given.shape[0] or given.shape[1] != value.shape[3]:
        raise ValueError(
            f"{layer_of(module)}: {sinks.SINK_VALUE} must be {heads} (query heads) or {key_heads} (key heads) by "
            f"{value.shape[3]} numbers, its value head dim, got {given.shape[0]} by {given.shape[1]}"
        )
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if not keep:
        return sharding.of_own_heads(module, _expanded(given, heads, dtype), query.shape[1], keep)
    known: Any = _EXPANDED.setdefault(given, {})
    if (heads, dtype) not in known:
        known[heads, dtype] = _expanded(given, heads, dtype).clone()
    return sharding.of_own_heads(module, known[heads, dtype], query.shape[1], keep)


def _expanded(given: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    return given.to(dtype).repeat_interleave(heads // given.shape[0], dim=0)


def together(own: Tensor, level: Tensor) -> Tensor:
    """log(e^own + e^level): the model's own sinks, (H,) or (B, H, S), and a level, 0-d or (H,)."""
    own, level = _alike(own, level)
    neither = torch.isneginf(own) & torch.isneginf(level)  # whose gradient would be NaN
    return torch.logaddexp(own.masked_fill(neither, 0.0), level.masked_fill(neither, 0.0)).masked_fill(neither, -torch.inf)


def beside(module: Any, carried: Tensor, level: Tensor | None, own: Tensor) -> Tensor:
    """What the mass of both sinks carries: (H, Dv), the level's share of it times its value.

    Raises:
        NotImplementedError: the model's own sinks differ by rows.
    """
    assert level is not None, "a value has a level"
    if own.dim() != 1:
        raise NotImplementedError(
            f"{layer_of(module)} has a sink of its own for each row, and {sinks.SINK_VALUE} is set: what the mass of both "
            "carries would differ by rows. Leave sink_value out"
        )
    own, level = _alike(own, level)
    share = torch.sigmoid((level - own).nan_to_num(0.0))  # of nothing, where both are -inf
    return carried * share[:, None].to(carried.dtype)


def _alike(own: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    level = level[:, None] if own.dim() == 3 and level.dim() == 1 else level
    return own.to(level.dtype), level.expand_as(own)
