"""The drop-ins: one for each attention entry point that PyTorch has, each with the signature of its namesake.

Each reads and checks the request and leaves the rest to dispatch.py. Given anything but a StableMask they are torch's own
functions.
"""

import inspect
from typing import Any, Literal, overload

import torch
import torch.nn.attention.flex_attention as torch_flex
import torch.nn.attention.varlen as torch_varlen
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, FlexKernelOptions

from sm_flex import _checks
from sm_flex.dispatch import attend, attend_packed, autocast
from sm_flex.engines import rule, varlen
from sm_flex.score_mod import ScoreMod, StableMask

_VARLEN_KEYWORDS = frozenset(inspect.signature(torch_varlen.varlen_attn).parameters)


@overload
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | StableMask | None = ...,
    block_mask: BlockMask | None = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    return_lse: Literal[False] = False,
    kernel_options: FlexKernelOptions | dict[str, Any] | None = ...,
    *,
    return_aux: None = ...,
) -> Tensor: ...


@overload
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | StableMask | None = ...,
    block_mask: BlockMask | None = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_lse: Literal[True],
    kernel_options: FlexKernelOptions | dict[str, Any] | None = ...,
    return_aux: None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | StableMask | None = ...,
    block_mask: BlockMask | None = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    return_lse: bool = ...,
    kernel_options: FlexKernelOptions | dict[str, Any] | None = ...,
    *,
    return_aux: AuxRequest,
) -> tuple[Tensor, AuxOutput]: ...


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | StableMask | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: FlexKernelOptions | dict[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    """torch.nn.attention.flex_attention.flex_attention, which with ``score_mod=stablemask(gamma)`` is eq. 11 of the paper.

    out = (softmax(A * C + P) * C) V, by the fastest library kernel that takes the call. Key j is visible to query i when
    j <= i + (T - S); block_mask narrows that.

    Args:
        query: (B, H, S, D). key, value: (B, Hkv, T, D) and (B, Hkv, T, Dv); Hkv < H needs enable_gqa.
        score_mod: a StableMask. With anything else this is torch's own function.
        block_mask: a BlockMask of (S, T), for what is visible within the causal slots (documents, windows, padding). A
            static cache with unused slots needs one.
        scale: of the scores, 1/sqrt(D) where None.
        return_lse: also return lse'; as torch, prefer return_aux.
        kernel_options: {"BACKEND": name} asks for one engine and raises where it cannot serve: FLASH_ATTENTION,
            CUDNN_ATTENTION, EFFICIENT_ATTENTION or MATH (plain PyTorch), or torch flex's own TRITON, TRITON_DECODE, FLASH.
            Other keys belong to torch's flex kernels and select them (CUDA).
        return_aux: AuxRequest(lse=True) also returns the natural log-sum-exp of the whole row of A_SM, (B, H, S) float32
            (float64 for float64), differentiable. max_scores is served by torch's flex on CUDA only.

    Returns:
        (B, H, S, Dv) in query's dtype; with return_lse (out, lse), with return_aux (out, AuxOutput).

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule, what came and the way out.

    On CUDA an inner score_mod or a block_mask runs on torch's flex kernels, which want torch.compile around the call.
    """
    if not isinstance(score_mod, StableMask):
        return torch_flex.flex_attention(  # pyright: ignore[reportCallIssue]
            query, key, value, score_mod, block_mask, scale, enable_gqa, return_lse,
            kernel_options,  # pyright: ignore[reportArgumentType]
            return_aux=return_aux,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
    query, key, value = autocast(query, key, value)
    _checks.check_qkv(query, key, value, enable_gqa, "BHSD")
    if return_lse and return_aux is not None:
        raise ValueError("return_lse and return_aux are one request twice: use return_aux=AuxRequest(lse=True)")
    if block_mask is not None:
        _checks.check_block_mask(block_mask, query, key)
    _checks.check_aux(return_aux, AuxRequest)
    _checks.check_kernel_options(kernel_options)
    options: dict[str, Any] = dict(kernel_options or {})
    backend = options.pop("BACKEND", "AUTO")
    max_scores = return_aux is not None and return_aux.max_scores
    if max_scores and score_mod.sink is not None:
        raise NotImplementedError("max_scores is not known of a StableMask with a sink, which may be many scores: leave it out")
    want_lse = return_lse or (return_aux is not None and return_aux.lse)
    if backend in rule.FLEX_BACKENDS:
        options["BACKEND"] = backend
    out, lse, row_max = attend(
        query, key, value, score_mod, scale=scale, block_mask=block_mask, backend=backend,
        flex_options=options, max_scores=max_scores, want_lse=want_lse,
    )  # fmt: skip
    if return_aux is not None:
        return out, AuxOutput(lse=lse if return_aux.lse else None, max_scores=row_max)
    if return_lse:
        assert lse is not None
        return out, lse
    return out


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
    _only_stablemask(score_mod, "scaled_dot_product_attention")
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    _checks.check_dropout(dropout_p)
    _checks.check_qkv(query, key, value, enable_gqa, "BHSD")
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
        _checks.check_attn_mask(attn_mask, query, key)
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
    return attend(query, key, value, score_mod, scale=scale, attn_mask=attn_mask, dropout_p=dropout_p)[0]


@overload
def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: None = ...,
    scale: float | None = ...,
    window_size: tuple[int, int] = ...,
    enable_gqa: bool = ...,
    seqused_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    num_splits: int | None = ...,
    score_mod: StableMask | None = ...,
) -> Tensor: ...


@overload
def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: torch_varlen.AuxRequest,
    scale: float | None = ...,
    window_size: tuple[int, int] = ...,
    enable_gqa: bool = ...,
    seqused_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    num_splits: int | None = ...,
    score_mod: StableMask | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: torch_varlen.AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    score_mod: StableMask | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """torch.nn.attention.varlen.varlen_attn, with ``score_mod=stablemask(gamma, length=N)`` for eq. 11 of the paper.

    Works on a CPU too. A document's queries are aligned to the end of its keys.

    Args:
        query: (T_q, H, D). key, value: (T_k, Hkv, D); Hkv < H needs enable_gqa.
        cu_seq_q, cu_seq_k: (documents + 1,) int32, the first row of each document and the total.
        max_q, max_k: the longest document's length.
        return_aux: AuxRequest(lse=True) also returns the natural log-sum-exp of the whole row of A_SM, (H, T_q).
        scale: of the scores, 1/sqrt(D) where None.
        window_size: with a StableMask (-1, 0), or (W, 0) for the query's own key and the W before it.
        seqused_k, block_table, num_splits: as in torch, on CUDA with a torch that has them, for inference.
        score_mod: a StableMask with a length, or None for torch's own function. Its positions are (T_q,); None means that
            they restart at 0 in each document, whose query and key lengths must then be equal.

    Returns:
        (T_q, H, D) in query's dtype, or (out, lse).

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule, what came and the way out.
    """
    newer = {"enable_gqa": enable_gqa, "seqused_k": seqused_k, "block_table": block_table, "num_splits": num_splits}
    newer = {name: x for name, x in newer.items() if x is not None and x is not False}
    if score_mod is None:
        missing = [name for name in newer if name not in _VARLEN_KEYWORDS]
        if missing:
            raise NotImplementedError(f"{missing[0]} is not known to varlen_attn of torch {torch.__version__}: leave it out")
        return torch_varlen.varlen_attn(
            query, key, value, cu_seq_q, cu_seq_k,  # pyright: ignore[reportArgumentType]
            max_q, max_k, return_aux=return_aux, scale=scale, window_size=window_size, **newer,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
    _only_stablemask(score_mod, "varlen_attn")
    query, key, value = autocast(query, key, value)
    _checks.check_aux(return_aux, torch_varlen.AuxRequest)
    paged = {name: newer[name] for name in ("seqused_k", "block_table", "num_splits") if name in newer}
    _checks.check_varlen(query, key, value, cu_seq_q, cu_seq_k, window_size, enable_gqa, score_mod, paged)
    _checks.check_longest("max_q", max_q, cu_seq_q)
    _checks.check_longest("max_k", max_k, cu_seq_k)
    missing = [name for name in paged if name not in _VARLEN_KEYWORDS]
    if missing or (paged and query.device.type != "cuda"):
        name = missing[0] if missing else next(iter(paged))
        raise NotImplementedError(
            f"{name} needs a newer torch on CUDA, got torch {torch.__version__} on {query.device}: leave it out"
        )
    want_lse = return_aux is not None and return_aux.lse
    out, lse = attend_packed(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, score_mod,
        scale=scale, window=window_size[0], paged=paged, want_lse=want_lse,
    )  # fmt: skip
    if want_lse:
        assert lse is not None
        return varlen.to_thd(out), lse.squeeze(0)
    return varlen.to_thd(out)


def _only_stablemask(score_mod: Any, name: str) -> None:
    if not isinstance(score_mod, StableMask):
        raise TypeError(
            f"score_mod of {name} must be a StableMask or None, got {type(score_mod).__name__}: torch's has no score_mod; "
            "use flex_attention, or stablemask(..., score_mod=...)"
        )
