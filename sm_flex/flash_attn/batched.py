"""flash_attn_func and its packed forms: (B, S, H, D)."""

from typing import Any

from torch import Tensor

from sm_flex.flash_attn.attend import attend_batch
from sm_flex.flash_attn.request import check_batch, check_slopes, check_stacked, check_tensors, read, refuse
from sm_flex.runtime import autocast
from sm_flex.score_mod import StableMask


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    score_mod: StableMask | None = None,
    learnable_sink: Tensor | None = None,
    **newer: Any,
) -> Tensor:
    """FlashAttention 2's flash_attn_func on PyTorch's engines, and with ``score_mod=stablemask(gamma)`` eq. 11.

    out = softmax(q k^T * scale) v. Query i stands at slot i + T - S, the end of its keys: causal shows it the
    keys up to its slot, window_size those from slot - left to slot + right. A query that sees no key is 0.

    Args:
        q: (B, S, H, D). k, v: (B, T, Hkv, D) and (B, T, Hkv, Dv), with H a multiple of Hkv.
        dropout_p: in [0, 1), of the attention weights.
        softmax_scale: of the scores, 1/sqrt(D) where None.
        causal: with it the right window is 0.
        window_size: (left, right), how many keys before and after its own slot a query sees; -1 for all.
        softcap: scores become softcap * tanh(score / softcap); 0 for as they are.
        alibi_slopes: (H,) or (B, H), float32: -slope * |i + T - S - j| is added to the score of query i and
            key j.
        deterministic: on a CPU all is; on CUDA refused unless torch.use_deterministic_algorithms is on.
        return_attn_probs: refused.
        score_mod: a StableMask, which wants causal=True. Its positions, where it has none, are the slots; with
            S != T it needs a length.
        learnable_sink: (H,), FlashAttention 4's: one more score per row, which has no value. It may require
            grad. Beside a StableMask use stablemask(..., sink=...).
        newer: FlashAttention 3's and 4's other keywords, with the value that asks for nothing; refused with
            another.

    Returns:
        (B, S, H, Dv) in q's dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule, what came and the way out.

    On a CPU softcap, alibi_slopes and dropout run in plain PyTorch, in blocks of rows. On CUDA softcap and
    alibi_slopes run on torch's flex kernels, which want torch.compile around the call.

    Example:
        >>> q = k = v = torch.randn(1, 5, 2, 8)
        >>> flash_attn_func(q, k, v, causal=True, score_mod=stablemask(0.5, length=16)).shape
        torch.Size([1, 5, 2, 8])
    """
    name = "flash_attn_func"
    if return_attn_probs:
        refuse("return_attn_probs", name)
    request = read(
        name, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, deterministic=deterministic, score_mod=score_mod, learnable_sink=learnable_sink,
        newer=newer,
    )  # fmt: skip
    q, k, v = autocast(q, k, v)
    check_tensors("BSHD", deterministic, q, k, v)
    check_batch("k", k, q)
    check_slopes(alibi_slopes, q.shape[0], q)
    return attend_batch(q, k, v, request)[0]


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    score_mod: StableMask | None = None,
    learnable_sink: Tensor | None = None,
    **newer: Any,
) -> Tensor:
    """:func:`flash_attn_func` with keys and values in one tensor, kv (B, T, 2, Hkv, D)."""
    k, v = check_stacked("kv", kv, 2, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        score_mod=score_mod, learnable_sink=learnable_sink, **newer,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    score_mod: StableMask | None = None,
    learnable_sink: Tensor | None = None,
    **newer: Any,
) -> Tensor:
    """:func:`flash_attn_func` with queries, keys and values in one tensor, qkv (B, S, 3, H, D)."""
    q, k, v = check_stacked("qkv", qkv, 3, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        score_mod=score_mod, learnable_sink=learnable_sink, **newer,
    )  # fmt: skip
