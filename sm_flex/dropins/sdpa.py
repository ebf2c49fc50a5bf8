"""sm_flex.scaled_dot_product_attention."""

import torch.nn.functional as F
from torch import Tensor

from sm_flex.checks import call as checks
from sm_flex.dispatch import attend
from sm_flex.runtime import autocast
from sm_flex.score_mod import StableMask, only_stablemask


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
    """torch.nn.functional.scaled_dot_product_attention, with ``score_mod=stablemask(gamma)`` for eq. 11 of the paper.

    Args:
        query: (B, H, S, D). key, value: (B, Hkv, T, D) and (B, Hkv, T, Dv); Hkv < H needs enable_gqa.
        attn_mask: bool (True is visible) or floating (added to the scores; it gets its gradient), broadcastable to
            (B, H, S, T). With a StableMask it narrows the causal slots: key j is visible when j <= i + (T - S) and
            attn_mask says so. A static cache with unused slots needs one.
        dropout_p: in [0, 1), of the real attention weights after the softmax; the mass is never dropped.
        is_causal: for S = T. A StableMask is causal: give is_causal=True or an attn_mask (a single query needs neither
            and sees every key).
        scale: of the scores, 1/sqrt(D) where None.
        score_mod: a StableMask, or None for torch's own function.

    Returns:
        (B, H, S, Dv) in query's dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule, what came and the way out.
    """
    if score_mod is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    only_stablemask(score_mod, "scaled_dot_product_attention")
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    checks.check_dropout(dropout_p)
    checks.check_qkv(query, key, value, enable_gqa, "BHSD")
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal and attn_mask must not both be given: attn_mask narrows the causal slots already")
    if not is_causal and attn_mask is None and query.shape[2] > 1 and score_mod.ordered:
        raise ValueError(
            "is_causal must be True, or attn_mask given, with a StableMask, which is causal. Where S != T pass "
            "attn_mask=torch.ones(S, T, dtype=torch.bool), which is narrowed to the causal slots, or use flex_attention"
        )
    if is_causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"is_causal needs equal lengths (torch aligns it to the start), got S={query.shape[2]} and T={key.shape[2]}: "
            "pass attn_mask, which a StableMask narrows to the causal slots aligned to the end"
        )
    if attn_mask is not None:
        checks.check_attn_mask(attn_mask, query, key)
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
    return attend(query, key, value, score_mod, scale=scale, attn_mask=attn_mask, dropout_p=dropout_p)[0]
