"""The drop-ins: one for each attention entry point that PyTorch has, each with the signature of its namesake.

Each reads the request, lets engines/rule.py pick the engine, and runs it: identity.py for library kernels, engines/flex.py
and engines/dense.py by themselves. Given anything but a StableMask they are torch's own functions.
"""

import inspect
import math
from typing import Any

import torch
import torch.nn.attention.flex_attention as torch_flex
import torch.nn.attention.varlen as torch_varlen
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, FlexKernelOptions

from sm_flex import _checks, identity, visibility
from sm_flex.engines import Settings, dense, flex, rule, varlen
from sm_flex.mass import Mass
from sm_flex.remask import epilogue
from sm_flex.score_mod import ScoreMod, StableMask

_VARLEN_KEYWORDS = frozenset(inspect.signature(torch_varlen.varlen_attn).parameters)


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
        block_mask: a BlockMask of (S, T), for what is visible within the causal slots (documents, windows, padding).
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
        return torch_flex.flex_attention(
            query, key, value, score_mod, block_mask, scale, enable_gqa, return_lse,
            kernel_options,  # pyright: ignore[reportArgumentType]
            return_aux=return_aux,
        )  # fmt: skip
    if return_lse and return_aux is not None:
        raise ValueError("return_lse and return_aux are one request twice: use return_aux=AuxRequest(lse=True)")
    if block_mask is not None and not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask must be a BlockMask or None, got {type(block_mask).__name__}")
    options = dict(kernel_options or {})
    backend = options.pop("BACKEND", "AUTO")
    max_scores = return_aux is not None and return_aux.max_scores
    want_lse = return_lse or (return_aux is not None and return_aux.lse)
    if block_mask is not None:
        _checks.check_block_mask(block_mask, query, key)
    if backend in rule.FLEX_BACKENDS:
        options["BACKEND"] = backend
    out, lse, row_max = _attend(
        query, key, value, score_mod, scale=scale, enable_gqa=enable_gqa, block_mask=block_mask, backend=backend,
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
    _checks.check_dropout(dropout_p)
    _checks.check_qkv(query, key, value, enable_gqa, "BHSD")
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal and attn_mask must not both be given: attn_mask narrows the causal slots already")
    if not is_causal and attn_mask is None and query.shape[2] > 1:
        raise ValueError("is_causal must be True, or attn_mask given, with a StableMask: it is causal attention")
    if is_causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"is_causal needs equal lengths (torch aligns it to the start), got S={query.shape[2]} and T={key.shape[2]}: "
            "pass attn_mask, which a StableMask narrows to the causal slots aligned to the end"
        )
    if attn_mask is not None:
        _checks.check_attn_mask(attn_mask, query, key)
    return _attend(
        query, key, value, score_mod, scale=scale, enable_gqa=enable_gqa, attn_mask=attn_mask, dropout_p=dropout_p
    )[0]  # fmt: skip


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
    paged = {name: newer[name] for name in ("seqused_k", "block_table", "num_splits") if name in newer}
    _checks.check_varlen(query, key, value, cu_seq_q, cu_seq_k, window_size, enable_gqa, score_mod, paged)
    missing = [name for name in paged if name not in _VARLEN_KEYWORDS]
    if missing or (paged and query.device.type != "cuda"):
        name = missing[0] if missing else next(iter(paged))
        raise NotImplementedError(f"{name} needs a newer torch on CUDA, got torch {torch.__version__} on {query.device}: leave it out")
    want_lse = return_aux is not None and return_aux.lse
    out, lse = _attend_packed(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, score_mod,
        scale=scale, window=window_size[0], paged=paged, want_lse=want_lse,
    )  # fmt: skip
    if want_lse:
        assert lse is not None
        return varlen.to_thd(out), lse.squeeze(0)
    return varlen.to_thd(out)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: StableMask,
    *,
    scale: float | None,
    enable_gqa: bool,
    attn_mask: Tensor | None = None,
    block_mask: BlockMask | None = None,
    dropout_p: float = 0.0,
    backend: str = "AUTO",
    flex_options: dict[str, Any] | None = None,
    max_scores: bool = False,
    want_lse: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out' (B, H, S, Dv), lse' (B, H, S) if wanted, and the row maxima if wanted."""
    _checks.check_qkv(q, k, v, enable_gqa, "BHSD")
    _checks.check_scale(scale)
    _checks.check_mask_fits(mask, q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    q, k, v, attn_mask = _autocast(q, k, v, attn_mask)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None and q.shape[-1] else float(scale or 0.0)
    need = rule.Need(
        score_mod=mask.score_mod is not None,
        block_mask=block_mask is not None,
        flex_options=bool(flex_options) or max_scores,
        dropout_p=dropout_p,
        lse_grad=want_lse and torch.is_grad_enabled(),
    )
    mass = mask.mass(q.device, q.shape[2], k.shape[2])
    with _no_autocast(q.device):
        engine = rule.choose(q, k, v, attn_mask, need, backend)
        if engine == "flex":
            return flex.attend(
                q, k, v, mass, scale=scale, score_mod=mask.score_mod, block_mask=block_mask,
                kernel_options=flex_options or {}, max_scores=max_scores,
            )  # fmt: skip
        if engine == "dense":
            out, lse = _dense(q, k, v, mass, mask.score_mod, attn_mask, block_mask, scale, dropout_p)
        else:
            out, lse = _kernel(engine, q, k, v, mass, attn_mask, scale, dropout_p, want_lse)
    return out, lse, None


def _kernel(
    engine: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mass: Mass,
    attn_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    num_queries, num_keys = q.shape[2], k.shape[2]
    bias = None
    if attn_mask is not None or rule.needs_bias(engine, q, k):
        bias = visibility.causal_bias(attn_mask, num_queries, num_keys, q.dtype, q.device)
    # A single query sees every key. The CPU op takes both a bias and its own flag, which skips the upper triangle.
    causal = num_queries > 1 and (bias is None or (engine == "cpu" and num_queries == num_keys))
    settings = Settings(causal, scale, dropout_p, may_be_dead=causal and num_queries > num_keys)
    return identity.attend(engine, q, k, v, bias, mass, settings, want_lse=want_lse)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mass: Mass,
    score_mod: ScoreMod | None,
    attn_mask: Tensor | None,
    block_mask: BlockMask | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    num_queries, num_keys = q.shape[2], k.shape[2]
    if block_mask is not None:
        rows = visibility.block_mask_rows(block_mask, num_queries, num_keys, q.shape[1], q.shape[0])
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        rows = visibility.bool_mask_rows(attn_mask, num_queries, num_keys)
    else:
        rows = visibility.causal_rows(num_queries, num_keys, q.device)
    bias = None
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        bias = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
    return dense.attend(
        q, k, v, mass.table(_wide(q)), rows, scale=scale, bias=bias, score_mod=score_mod, dropout_p=dropout_p
    )


def _attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    mask: StableMask,
    *,
    scale: float | None,
    window: int,
    paged: dict[str, Any],
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """out' (1, H, T_q, D), and lse' (1, H, T_q) if wanted, of packed documents."""
    _checks.check_scale(scale)
    q, k, v, _ = _autocast(q, k, v, None)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    mass = mask.mass(q.device, q.shape[0], k.shape[0], cu_q if mask.positions is None else None)
    settings = Settings(True, scale, 0.0, cu_q is not cu_k, window, max_q, max_k)
    with _no_autocast(q.device):
        if paged:
            call = identity.Call(q, k, v, None, cu_q, cu_k, settings)
            out, lse, _ = varlen.forward(call, **paged)
            return epilogue(out, lse, mass, in_place=True)
        assert cu_k is not None, "only a paged cache has no cu_seq_k"
        engine = rule.choose_packed(q, k, v)
        if engine == "dense":
            rows = visibility.document_rows(cu_q, cu_k, q.shape[0], k.shape[0], window)
            q, k, v = (varlen.to_bhsd(x) for x in (q, k, v))
            return dense.attend(q, k, v, mass.table(_wide(q)), rows, scale=scale)
        return identity.attend(engine, q, k, v, None, mass, settings, cu_q=cu_q, cu_k=cu_k, want_lse=want_lse)


def _only_stablemask(score_mod: Any, name: str) -> None:
    if not isinstance(score_mod, StableMask):
        raise TypeError(
            f"score_mod of {name} must be a StableMask or None, got {type(score_mod).__name__}: torch's has no score_mod; "
            "use flex_attention, or stablemask(..., score_mod=...)"
        )


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _autocast(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What autocast does to scaled_dot_product_attention: floating inputs but float64 take its dtype."""
    kind = q.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if q.dtype != torch.float64:
            q, k, v = (x.to(dtype) for x in (q, k, v))
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(dtype)
    return q, k, v, attn_mask


def _no_autocast(device: torch.device) -> Any:
    """The engines choose their own precision: nothing inside them may be cast."""
    return torch.autocast(device.type, enabled=False)
