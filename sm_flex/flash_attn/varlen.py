"""flash_attn_varlen_func and its packed forms: documents laid one after another, (T, H, D)."""

from typing import Any

from torch import Tensor

from sm_flex.checks.packed import check_cu_seqlens, check_cu_values, check_longest
from sm_flex.flash_attn.attend import attend_documents
from sm_flex.flash_attn.request import check_slopes, check_stacked, check_tensors, read, refuse
from sm_flex.runtime import autocast
from sm_flex.score_mod import StableMask


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    score_mod: StableMask | None = None,
    learnable_sink: Tensor | None = None,
    **newer: Any,
) -> Tensor:
    """FlashAttention 2's flash_attn_varlen_func on PyTorch's engines, and with a StableMask eq. 11.

    :func:`flash_attn_func` within each document. A document's queries stand at the end of its keys.

    Args:
        q: (T_q, H, D). k, v: (T_k, Hkv, D) and (T_k, Hkv, Dv), with H a multiple of Hkv.
        cu_seqlens_q, cu_seqlens_k: (documents + 1,) int32, the first row of each document and the total.
        max_seqlen_q, max_seqlen_k: the longest document's length.
        dropout_p, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs, learnable_sink,
            newer: as in flash_attn_func.
        alibi_slopes: (H,), or (documents, H), float32.
        block_table: refused.
        score_mod: a StableMask with a length, which wants causal=True. Its positions are (T_q,); None means
            each query's slot in its own document.

    Returns:
        (T_q, H, Dv) in q's dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule, what came and the way out.

    softcap, alibi_slopes and dropout see all packed rows as one sequence with a mask, which takes T_q x T_k time.

    Example:
        >>> q = k = v = torch.randn(7, 2, 8)  # a document of 3 tokens and one of 4
        >>> cu = torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> flash_attn_varlen_func(q, k, v, cu, cu, 4, 4, causal=True).shape
        torch.Size([7, 2, 8])
    """
    name = "flash_attn_varlen_func"
    if return_attn_probs:
        refuse("return_attn_probs", name)
    if block_table is not None:
        refuse("block_table", name)
    request = read(
        name, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, deterministic=deterministic, score_mod=score_mod, learnable_sink=learnable_sink,
        newer=newer,
    )  # fmt: skip
    q, k, v = autocast(q, k, v)
    check_tensors("THD", deterministic, q, k, v)
    for cu_name, cu, total in (("cu_seqlens_q", cu_seqlens_q, q.shape[0]), ("cu_seqlens_k", cu_seqlens_k, k.shape[0])):
        check_cu_seqlens(cu_name, cu, q.device, "q")
        check_cu_values(cu_name, cu, total)
    documents = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(f"cu_seqlens_k must have the documents of cu_seqlens_q, {documents}, got {cu_seqlens_k.shape[0] - 1}")
    check_longest("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
    check_longest("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
    check_slopes(alibi_slopes, documents, q)
    return attend_documents(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, request)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
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
    """:func:`flash_attn_varlen_func` with keys and values in one tensor, kv (T_k, 2, Hkv, D)."""
    k, v = check_stacked("kv", kv, 2, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs, score_mod=score_mod, learnable_sink=learnable_sink,
        **newer,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
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
    """:func:`flash_attn_varlen_func` with queries, keys and values in one tensor, qkv (T, 3, H, D)."""
    q, k, v = check_stacked("qkv", qkv, 3, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs, score_mod=score_mod, learnable_sink=learnable_sink,
        **newer,
    )  # fmt: skip
