"""Continuous batching (``model.generate_batch``): one row of tokens of many requests, each over keys of its own in a paged cache.

Transformers lets its own attentions do this and no others, and puts FlashAttention in their place where that is installed, which
would be plain causal attention under StableMask's name. So importing this package wraps two methods of
ContinuousBatchingManager: a model that runs stablemask or sm_flex keeps it, without CUDA graphs. For any other attention both do
what they did.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from packaging.version import parse
from torch import Tensor
from transformers import __version__
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from sm_flex import StableMask, varlen_attn
from sm_flex_transformers.interface import NAMES, layer_of
from sm_flex_transformers.windows import window_size

UNTAKEN = ("softcap", "indices", "block_indices", "position_bias")


def install() -> None:
    """Wraps the two methods, once."""
    make, choose = ContinuousBatchingManager.__init__, ContinuousBatchingManager.switch_to_cb_friendly_attn
    if hasattr(choose, "__wrapped__"):
        return
    known = parse(__version__).release >= (5, 24)  # before, it was the attention function that wrote the paged cache

    @functools.wraps(make)
    def __init__(self: Any, model: Any, generation_config: Any, continuous_batching_config: Any, *args: Any, **kw: Any) -> None:
        if _ours(model):
            continuous_batching_config = _without_graphs(continuous_batching_config)
        make(self, model, generation_config, continuous_batching_config, *args, **kw)

    @functools.wraps(choose)
    def switch_to_cb_friendly_attn(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if not _ours(model):
            choose(self, model, *args, **kwargs)
        elif not known:
            raise NotImplementedError(
                f"continuous batching with {model.config._attn_implementation} needs Transformers 5.24, got {__version__}"
            )

    ContinuousBatchingManager.__init__ = __init__
    ContinuousBatchingManager.switch_to_cb_friendly_attn = switch_to_cb_friendly_attn


def _ours(model: Any) -> bool:
    return model.config._attn_implementation in NAMES


def _without_graphs(config: Any) -> Any:
    asked = config.use_cuda_graph
    if asked is None or asked is False:
        return dataclasses.replace(config, use_cuda_graph=False)
    raise NotImplementedError(f"use_cuda_graph must be False with stablemask or sm_flex, got {asked}: leave it out")


def is_batched(given: dict[str, Any]) -> bool:
    """Whether a layer was called in continuous batching: only there is it handed the keys to read of each kind of layer."""
    return isinstance(given.get("read_index"), list)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Callable[[], StableMask],
    attention_mask: Tensor | None,
    scaling: float | None,
    given: dict[str, Any],
) -> Tensor:
    """Causal attention (1, S, H, Dv) of each request's queries over its own keys: (1, H, S, D) over (1, Hkv, T, D).

    mask makes the StableMask of all rows. given: the keywords that the layer was called with.

    Raises:
        NotImplementedError: what the attention over packed rows does not take.
    """
    types, layer = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    window = given.get("sliding_window")
    named = [name for name in UNTAKEN if given.get(name) is not None]
    if attention_mask is not None:
        named.append("attention_mask")
    if window is None and types and layer is not None and "sliding" in types[layer]:
        named.append("a window that it does not name")
    if named:
        raise NotImplementedError(
            f"{layer_of(module)} has {', '.join(named)}, which continuous batching does not take: use generate()"
        )
    q, k, v = [x[0].transpose(0, 1) for x in (query, key, value)]
    cu_q, cu_k = [given[name].to(torch.int32) for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    out = varlen_attn(
        q, k, v, cu_q, cu_k, given["max_length_q"], given["max_length_k"], scale=scaling,
        window_size=window_size(window), enable_gqa=True, score_mod=mask(),
    )  # fmt: skip
    return out[None].contiguous()
