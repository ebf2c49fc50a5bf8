"""The attention function that Transformers calls in every layer, with (B, H, S, D) queries and (B, Hkv, T, D) keys."""

from typing import Any

import torch
from torch import Tensor, nn

from sm_flex import scaled_dot_product_attention
from sm_flex.score_mod import ScoreMod
from sm_flex_transformers import masks, requests


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

    The mass goes by position_ids, so padding, packed rows, chunks and caches give the rows of one full pass; who sees whom
    goes by attention_mask.

    Args:
        query: (B, H, S, D). key, value: (B, Hkv, T, D), the cache included.
        attention_mask: what stablemask_mask made, or a user's own (B, 1, S, T): bool, or float with 0 and the minimum. None is
            plain causal attention; T > S then means a static cache whose later slots are still empty.
        position_ids: (B, S) or (1, S), each token's position in its own sequence.
        softcap: tanh(score / softcap) * softcap on the real scores (Gemma 2).

    Returns:
        (B, S, H, D), and None: there are no attention weights.

    Raises:
        TypeError, ValueError, NotImplementedError: what StableMask cannot do right: output_attentions, bidirectional layers,
            sinks, a bias on the scores, missing or multi-axis position_ids.
    """
    _refuse(module, is_causal, position_ids, kwargs)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if attention_mask is None and 1 < num_queries < num_keys:
        key, value = key[:, :, :num_queries], value[:, :, :num_queries]
        num_keys = num_queries
    visible = masks.visible_keys(attention_mask, num_queries, num_keys)
    if position_ids is None and (visible is not None or num_queries != num_keys):
        raise ValueError(
            f"{type(module).__name__} passes no position_ids to its attention, so stablemask cannot place padded or cached "
            "tokens: call it without padding and without a cache"
        )
    positions = position_ids
    if position_ids is not None and visible is not None:
        positions = masks.from_first_token(position_ids, visible, num_keys)
    if position_ids is not None and num_queries == num_keys > 1:
        visible = masks.within_documents(visible, position_ids)
    if visible is None and kwargs.get("cu_seq_lens_q") is not None and len(kwargs["cu_seq_lens_q"]) > 2:
        raise ValueError("cu_seq_lens_q needs position_ids that restart at 0 in each document: pass those too")
    if softcap is None and positions is position_ids:
        mask = requests.shared(module, position_ids, query.device)
    else:
        mask = requests.new(module, positions, query.device, _soft_capping(softcap))
    out = scaled_dot_product_attention(
        query, key, value,
        attn_mask=visible, dropout_p=dropout, is_causal=visible is None and num_queries > 1, scale=scaling, enable_gqa=True,
        score_mod=mask,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _refuse(module: nn.Module, is_causal: bool | None, position_ids: Tensor | None, kwargs: dict[str, Any]) -> None:
    config: Any = module.config
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"stablemask serves decoder-only models, got {type(config).__name__}, an encoder-decoder")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotImplementedError(f"stablemask is causal and {type(module).__name__} is not: use another attn_implementation")
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise NotImplementedError("output_attentions=True: stablemask never forms the attention weights")
    for name, what in (("s_aux", "attention sinks"), ("position_bias", "a bias on the scores")):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} has {what} ({name}), which stablemask does not take")
    if position_ids is not None and position_ids.dim() != 2:
        raise NotImplementedError(f"position_ids must be (B, S), got {tuple(position_ids.shape)}: stablemask needs one axis")


def _soft_capping(softcap: float | None) -> ScoreMod | None:
    if softcap is None:
        return None

    def soft_capping(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    return soft_capping
