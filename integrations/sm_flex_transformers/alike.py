"""Layers of one forward that are handed the same: what was read for the first of them holds for the others.

To read what a layer was handed takes longer than a decode step's attention.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sm_flex import StableMask
from sm_flex_transformers import forwards, settings


class Read(NamedTuple):
    """A layer without a mask, a window or a sink, all that it was handed, and the StableMask that followed."""

    layer: type[nn.Module]
    config: Any
    position_ids: Tensor
    version: int
    query_shape: torch.Size
    num_keys: int
    given: dict[str, Any]
    mask: StableMask


def recall(
    module: Any, query: Tensor, key: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, given: dict[str, Any]
) -> StableMask | None:
    """The StableMask of a layer that is handed what an earlier one of the running forward was; None where none was.

    given: all else that the layer hands its attention.
    """
    if attention_mask is not None or position_ids is None or torch.compiler.is_compiling():
        return None
    read = forwards.read_by_a_layer()
    if (
        read is None
        or position_ids is not read.position_ids
        or module.config is not read.config
        or type(module) is not read.layer
        or query.shape != read.query_shape
        or key.shape[2] != read.num_keys
        or position_ids._version != read.version
        or len(given) != len(read.given)
        or not getattr(module, "is_causal", True)
    ):
        return None
    for name, x in given.items():
        if name not in read.given or read.given[name] is not x:
            return None
    return read.mask


def remember(module: Any, query: Tensor, key: Tensor, position_ids: Tensor, given: dict[str, Any], mask: StableMask) -> None:
    """For the next layers, where they do not have settings of their own."""
    config = module.config
    asked = settings.of(config) or {}
    own = getattr(config, "is_heterogeneous", False) or asked.get("sink") is not None
    if own or torch.compiler.is_compiling() or position_ids.is_inference():
        return
    version = position_ids._version
    forwards.keep_read(Read(type(module), config, position_ids, version, query.shape, key.shape[2], dict(given), mask))
