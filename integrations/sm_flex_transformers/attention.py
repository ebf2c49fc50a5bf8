"""The attention function that Transformers calls in every layer, with (B, H, S, D) queries and (B, Hkv, T, D) keys."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sm_flex import StableMask, scaled_dot_product_attention
from sm_flex.score_mod import ScoreMod
from sm_flex_transformers import alike, batching, forwards, keywords, layer_masks, layer_rows, packed_rows, settings, windows
from sm_flex_transformers.interface import name_of

PLAIN = settings.Settings(None, 1)  # no gamma and no sink


def stablemask_attention(
    module: nn.Module,
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
) -> tuple[Tensor, None]:
    """StableMask attention (eq. 11) of one layer, with gamma and the training length from module.config.stablemask.

    The mass goes by position_ids, so padding, packed rows, chunks and caches give the rows of one full pass. Who sees whom
    goes by attention_mask.

    Args:
        query: (B, H, S, D). key, value: (B, Hkv, T, D), the cache included.
        attention_mask: what stablemask_mask made, or one of the user's or the model's own (B, 1|H, S, T): bool, or floating,
            with the minimum or -inf where a key is hidden, and elsewhere added to the scores. None is plain causal attention;
            more keys than positions then means a static cache whose later slots are still empty.
        position_ids: (B, S) or (1, S), each token's position in its own sequence. Where there are more of them than queries,
            the model has dropped rows (Gemma 4 before its layers with shared keys): the last ones are those of the queries.
        softcap: tanh(score / softcap) * softcap on the real scores (Gemma 2).
        kwargs: whatever else the model hands its attention: harmless, a selection of keys, a bias, or refused (keywords.py).

    Returns:
        (B, S, H, D), and None: there are no attention weights.

    Raises:
        TypeError, ValueError, NotImplementedError: what StableMask cannot do right: output_attentions, bidirectional layers,
            sinks of another shape, missing or multi-axis position_ids, a keyword that is not known.
    """
    forwards.note_call()
    given = {**kwargs, "dropout": dropout, "is_causal": is_causal, "softcap": softcap}
    known = alike.recall(module, query, key, attention_mask, position_ids, given)
    if known is not None:
        return _attend(query, key, value, known, scaling), None
    _check(module, is_causal, kwargs)
    asked = layer_masks.asked(module, query, key, value, kwargs)
    placed = asked is not None and asked.gamma is not None
    if placed and position_ids is not None and position_ids.dim() != 2:
        raise NotImplementedError(f"position_ids must be (B, S), got {tuple(position_ids.shape)}: stablemask needs one axis")
    if batching.is_batched(kwargs):
        make = functools.partial(layer_masks.packed, asked or PLAIN, position_ids, query, key.shape[2])
        return batching.attend(module, query, key, value, make, attention_mask, scaling, {**kwargs, "softcap": softcap}), None
    rows = layer_rows.read(module, query, key, value, attention_mask, position_ids, placed, softcap, kwargs)
    if softcap is None and dropout == 0.0 and packed_rows.serves(rows, query):
        mask = layer_masks.packed(asked or PLAIN, rows.positions, query, rows.key.shape[2])
        return packed_rows.attend(query, rows, mask, scaling), None
    whole = rows.key is key
    key, value, visible, bias = rows.key, rows.value, layer_rows.visible(module, rows, query), rows.bias
    if asked is None and softcap is None and bias is None:
        return sdpa_attention_forward(module, query, key, value, visible, dropout, scaling, is_causal=True)
    if not rows.ordered:
        key, value, visible = windows.behind_all(key, value, visible, query.shape[2])
    allowed = visible if bias is None else keywords.biased(bias, visible, query.dtype, key.shape[2])
    if placed and asked is not None and softcap is None and rows.positions is position_ids:
        mask = layer_masks.cached(asked, position_ids, query)
        if whole and allowed is None and attention_mask is None and position_ids is not None and dropout == 0.0:
            alike.remember(module, query, key, position_ids, given, mask)
    else:
        mask = layer_masks.make(asked or PLAIN, rows.positions, query, key.shape[2], _soft_capping(softcap))
    return _attend(query, key, value, mask, scaling, allowed, dropout), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: StableMask, scaling: float | None,
    allowed: Tensor | None = None, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """(B, S, H, D)"""
    out = scaled_dot_product_attention(
        query, key, value,
        attn_mask=allowed, dropout_p=dropout, is_causal=allowed is None and query.shape[2] > 1, scale=scaling, enable_gqa=True,
        score_mod=mask,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous()


def sm_flex_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """The model's own causal attention, its learned sinks included: StableMask only where module.config.stablemask asks for it.

    Without config.stablemask a sink is all the mass that a row has, the same at every position: no position_ids are needed.
    Without sinks too it is Transformers' sdpa. Arguments, result and errors are those of stablemask_attention.
    """
    return stablemask_attention(*args, **kwargs)


def _check(module: nn.Module, is_causal: bool | None, kwargs: dict[str, Any]) -> None:
    config: Any = module.config
    name = name_of(config)
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"{name} serves decoder-only models, got {type(config).__name__}, an encoder-decoder")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotImplementedError(f"{name} is causal and {type(module).__name__} is not: use another attn_implementation")
    keywords.check(module, kwargs)


def _soft_capping(softcap: float | None) -> ScoreMod | None:
    if softcap is None:
        return None

    def soft_capping(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    return soft_capping
