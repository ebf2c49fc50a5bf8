"""The calls of a model's attention layers: taken on their way, and read as calls of the core.

Dimension letters: B sequences, H query heads, S queries, T keys, D and Dv head dims.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from transformers import AttentionInterface

from sm_flex import StableMask
from sm_flex.diagnostics import windowed_attention
from sm_flex.score_mod import ScoreMod
from sm_flex_transformers import forwards, keywords, layer_masks, layer_rows
from sm_flex_transformers.attention import PLAIN, _soft_capping
from sm_flex_transformers.interface import NAMES, layer_of

Attention = Callable[..., tuple[Tensor, Any]]


class LayerCall(NamedTuple):
    """query (B, H, S, D), key (B, Hkv, S, D), value (B, Hkv, S, Dv); the rest as sm_flex.diagnostics takes it."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: StableMask | None
    scale: float | None
    visible: Tensor | None
    sliding: int | None


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def around_attention(around: Callable[..., tuple[Tensor, Any]]) -> Iterator[None]:
    """Within it every attention layer calls around(attention, module, query, key, value, attention_mask, **kwargs).

    attention is what the layer would have called, whatever its name: the config, the masks that are made for it and the
    model's own eager function stay what they are. Of all models of the process: one look at a time.
    """
    ask = AttentionInterface.get_interface

    @functools.wraps(ask)
    def get_interface(self: AttentionInterface, *args: Any, **kwargs: Any) -> Attention:
        return functools.partial(around, ask(self, *args, **kwargs))

    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = ask


def read(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> LayerCall:
    """What an attention function is called with, as sm_flex.diagnostics takes it.

    Raises:
        NotImplementedError: a layer that is not causal, or is handed what is not known here.
    """
    if getattr(module.config, "is_encoder_decoder", False) or not (
        getattr(module, "is_causal", True) if is_causal is None else is_causal
    ):
        raise NotImplementedError(f"{layer_of(module)} is not causal: look takes decoder-only causal models")
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise NotImplementedError(
            f"{layer_of(module)} got a {type(attention_mask).__name__} for its mask: load the model with "
            'attn_implementation="sm_flex", which is its own attention'
        )
    if query.shape[2] != key.shape[2]:
        raise NotImplementedError(
            f"{layer_of(module)} has {query.shape[2]} queries and {key.shape[2]} keys: look takes layers that see one whole "
            "sequence"
        )
    keywords.check(module, kwargs)
    if module.config._attn_implementation in NAMES:
        asked = layer_masks.asked(module, query, key, value, kwargs)
    else:
        own = keywords.sink(module, kwargs, query)
        asked = None if own is None else PLAIN._replace(sink=own)
    placed = asked is not None and asked.gamma is not None
    rows = layer_rows.read(module, query, key, value, attention_mask, position_ids, placed, softcap, kwargs)
    if not rows.ordered:
        raise NotImplementedError(f"{layer_of(module)} has keys behind the others: look takes keys that follow the sequence")
    visible = layer_rows.visible(module, rows._replace(window=None), query)
    mask = None
    if not (asked is None and softcap is None and rows.bias is None):
        on_scores = _soft_capping(softcap) if rows.bias is None else _adding(rows.bias, query)
        mask = layer_masks.make(asked or PLAIN, rows.positions, query, key.shape[2], on_scores)
    return LayerCall(query, rows.key, rows.value, mask, scaling, visible, rows.window)


def windowed(call: LayerCall, window: int, keep: int) -> Tensor:
    """(B, S, H, Dv), as a layer wants its output: attention to the ``window`` most recent keys and the first ``keep``."""
    out = windowed_attention(
        call.query, call.key, call.value, call.mask, window=window, keep=keep, scale=call.scale, visible=call.visible,
        sliding=call.sliding,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous()


def note_call() -> None:
    """For an attention that stands in for ours: a model that runs stablemask or sm_flex has called it."""
    forwards.note_call()


def _adding(bias: Tensor, query: Tensor) -> ScoreMod:
    bias_BHST = bias.detach().expand(*query.shape[:2], -1, -1).masked_fill(bias == -math.inf, 0)  # visible hides those

    def add_bias(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + bias_BHST[b, h, q_idx, kv_idx]

    return add_bias
