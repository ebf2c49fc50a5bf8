"""The attention function that Transformers calls in every layer, with (B, H, S, D) queries and (B, Hkv, T, D) keys."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sm_flex import scaled_dot_product_attention
from sm_flex.score_mod import ScoreMod
from sm_flex_transformers import batching, forwards, keywords, layer_masks, masks, windows
from sm_flex_transformers.interface import extends_its_mask, layer_of, name_of, tells_its_masks_positions


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
    _check(module, is_causal, kwargs)
    asked, sink = layer_masks.asked(module, query), keywords.sink(module, kwargs, query)
    unplaced = position_ids is None
    if position_ids is not None and position_ids.dim() != 2:
        if asked is not None:
            raise NotImplementedError(f"position_ids must be (B, S), got {tuple(position_ids.shape)}: stablemask needs one axis")
        position_ids = None
    num_queries, num_keys = query.shape[2], key.shape[2]
    if batching.is_batched(kwargs):
        given = {**kwargs, "softcap": softcap}
        mask = functools.partial(layer_masks.packed, asked, position_ids, query, num_keys, sink)
        return batching.attend(module, query, key, value, mask, attention_mask, scaling, given), None
    num_positions = num_queries if position_ids is None else position_ids.shape[1]
    config: Any = module.config
    ordered = not extends_its_mask(config.model_type)
    if attention_mask is None and not ordered:
        raise ValueError(f"{layer_of(module)} has keys behind the others and got no attention_mask that says who sees them")
    if attention_mask is None and 1 < num_positions < num_keys:  # the unused slots of a static cache
        key, value = key[:, :, :num_positions], value[:, :, :num_positions]
        num_keys = num_positions
    seen = masks.read(attention_mask, position_ids, num_queries, num_keys, ordered)
    bias = keywords.bias_on_scores(module, kwargs, seen.bias, query, num_keys, softcap)
    if position_ids is None and asked is not None:
        _check_default_positions(module, seen.visible is not None or num_queries != num_keys, num_queries)
    if unplaced and asked is None:
        _check_documents(module, seen, num_queries, num_keys)
    positions, documents, visible = position_ids, None, seen.visible
    if position_ids is not None:
        if asked is not None:
            positions = masks.positions_of(seen, position_ids, num_queries, num_keys)
        documents = masks.documents(seen, position_ids, num_queries, num_keys)
    told = kwargs.get("cu_seq_lens_q")
    if told is not None and len(told) > 2 and visible is None and documents is None:
        raise ValueError("cu_seq_lens_q needs position_ids that restart in each document: pass those too")
    selected = keywords.selected_keys(module, kwargs, attention_mask, position_ids, query, num_keys)
    window = windows.width(kwargs.get("sliding_window"), attention_mask, num_keys)
    by_slot = bias is not None or selected is not None
    if window is not None and documents is None and not by_slot and num_queries < num_keys:
        key, value = [x[:, :, max(0, num_keys - num_queries - window + 1) :] for x in (key, value)]
        num_keys, window = key.shape[2], window if num_queries > 1 else None
    if visible is None and not by_slot and softcap is None and dropout == 0.0 and num_queries > 1:
        whole = documents is None or (documents.cu_seqlens is not None and num_queries == num_keys)
        needed = window is not None or documents is not None or num_queries < num_keys
        if needed and whole and windows.has_kernel(query):
            mask = layer_masks.packed(asked, positions, query, num_keys, sink)
            cu_seqlens = None if documents is None else documents.cu_seqlens
            return windows.attend(query, key, value, mask, window, cu_seqlens, scaling), None
    if documents is not None:
        same = masks.same_document(documents, num_queries)
        visible = same if visible is None else visible & same
    if selected is not None:
        keywords.check_selected_within(module, seen.visible, visible)
        visible = selected if visible is None else visible & selected
    if window is not None or (visible is None and 1 < num_queries < num_keys):
        visible = windows.narrowed(visible, window, num_queries, num_keys, query.device)
    if asked is None and sink is None and softcap is None and bias is None:
        return sdpa_attention_forward(module, query, key, value, visible, dropout, scaling, is_causal=True)
    if not ordered:
        key, value, visible = windows.behind_all(key, value, visible, num_queries)
        num_keys = key.shape[2]
    allowed = visible if bias is None else keywords.biased(bias, visible, query.dtype, num_keys)
    if asked is not None and sink is None and softcap is None and positions is position_ids:
        mask = layer_masks.cached(asked, position_ids, query)
    else:
        mask = layer_masks.make(asked, positions, query, num_keys, _soft_capping(softcap), sink)
    out = scaled_dot_product_attention(
        query, key, value,
        attn_mask=allowed, dropout_p=dropout, is_causal=allowed is None and num_queries > 1, scale=scaling, enable_gqa=True,
        score_mod=mask,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


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


def _check_documents(module: Any, seen: masks.Seen, num_queries: int, num_keys: int) -> None:
    """A layer that is handed no position_ids cannot keep packed documents apart: its mask must, where the model makes it so."""
    given = forwards.given_positions(num_queries)
    if given is None or given.dim() != 2 or not forwards.may_have_a_cache():
        return
    if not tells_its_masks_positions(module.config.model_type):
        return  # packed documents mix in its own attention too
    documents = masks.documents(seen, given, num_queries, num_keys)
    if documents is not None:
        same = masks.same_document(documents, num_queries)
        keywords.check_told_of_documents(module, "is handed no position_ids", seen.visible, same)


def _check_default_positions(module: nn.Module, masked: bool, num_queries: int) -> None:
    """Without position_ids only a plain call is served: the positions 0..S-1, no mask and no cache."""
    if masked or forwards.lost_positions(num_queries):
        raise ValueError(
            f"{type(module).__name__} got no position_ids, and this call has a mask, a cache or positions of its own, so "
            "stablemask cannot tell where its rows are: pass position_ids to the model. Where that does not help, the model does "
            "not hand them to its attention, and only its plain calls are served"
        )


def _soft_capping(softcap: float | None) -> ScoreMod | None:
    if softcap is None:
        return None

    def soft_capping(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    return soft_capping
