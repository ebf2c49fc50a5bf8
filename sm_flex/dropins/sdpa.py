"""torch.nn.functional.scaled_dot_product_attention, with a score_mod for a StableMask."""

import torch.nn.functional as F
from torch import Tensor

from sm_flex import plans
from sm_flex.checks.fits import check_is_stablemask, check_mask_fits
from sm_flex.checks.tensors import check_attn_mask, check_dropout, check_qkv, check_scale
from sm_flex.dispatch import attend, attend_planned
from sm_flex.runtime import autocast
from sm_flex.score_mod import StableMask


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    score_mod: StableMask | None = None,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, and with ``score_mod=stablemask(gamma)`` eq. 11.

    out = (softmax(A * C + P) * C) V, by the kernel that torch's own function would take.

    Args:
        query: (B, H, S, D). key, value: (B, Hkv, T, D) and (B, Hkv, T, Dv); Hkv < H needs enable_gqa.
        attn_mask: bool (True is visible) or floating (added to the scores; it gets its gradient),
            broadcastable to (B, H, S, T). With a StableMask it narrows the causal slots: key j is visible
            when j <= i + (T - S) and attn_mask says so. A static cache with unused slots needs one.
        dropout_p: in [0, 1), of the real attention weights after the softmax. The mass is never dropped.
        is_causal: for S = T. A StableMask is causal: give is_causal=True or an attn_mask (a single query
            needs neither and sees every key).
        scale: of the scores, 1/sqrt(D) where None.
        score_mod: a StableMask, or None for torch's own function.

    Returns:
        (B, H, S, Dv) in query's dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule, what came and the way out.

    Example:
        >>> q = k = v = torch.randn(1, 2, 5, 8)
        >>> scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=stablemask(0.5, length=16)).shape
        torch.Size([1, 2, 5, 8])
    """
    if score_mod is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    check_is_stablemask(score_mod, "scaled_dot_product_attention")
    kind = None
    if attn_mask is None and type(is_causal) is bool and type(enable_gqa) is bool and type(dropout_p) is float and not dropout_p:
        kind = plans.kind_of(query, key, value, score_mod, scale, "sdpa", is_causal, enable_gqa)
        plan = plans.find(kind)
        if plan is not None:
            return attend_planned(query, key, value, score_mod, plan)[0]
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    check_dropout(dropout_p)
    check_qkv(query, key, value, enable_gqa, "BHSD")
    num_queries, num_keys = query.shape[2], key.shape[2]
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal and attn_mask must not both be given: attn_mask narrows the causal slots already")
    if not is_causal and attn_mask is None and num_queries > 1 and score_mod.ordered:
        raise ValueError(
            "is_causal must be True, or attn_mask given, with a StableMask, which is causal. Where S != T pass "
            "attn_mask=torch.ones(S, T, dtype=torch.bool), which is narrowed to the causal slots, or use flex_attention"
        )
    if is_causal and num_queries != num_keys:
        raise ValueError(
            f"is_causal needs equal lengths (torch aligns it to the start), got S={num_queries} and T={num_keys}: "
            "pass attn_mask, which a StableMask narrows to the causal slots aligned to the end"
        )
    if attn_mask is not None:
        check_attn_mask(attn_mask, query, key)
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
    check_scale(scale)
    check_mask_fits(score_mod, query.shape[:3], num_keys, query.device, values=value.shape[1::2])
    return attend(query, key, value, score_mod, scale=scale, attn_mask=attn_mask, dropout_p=dropout_p, kind=kind)[0]
