"""sm_flex.varlen_attn."""

import inspect
from typing import overload

import torch
import torch.nn.attention.varlen as torch_varlen
from torch import Tensor

from sm_flex.checks import packed as checks
from sm_flex.checks.call import check_aux
from sm_flex.dispatch import attend_packed
from sm_flex.engines import varlen
from sm_flex.runtime import autocast
from sm_flex.score_mod import StableMask, only_stablemask

_VARLEN_KEYWORDS = frozenset(inspect.signature(torch_varlen.varlen_attn).parameters)


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
    only_stablemask(score_mod, "varlen_attn")
    query, key, value = autocast(query, key, value)
    check_aux(return_aux, torch_varlen.AuxRequest)
    paged = {name: newer[name] for name in ("seqused_k", "block_table", "num_splits") if name in newer}
    checks.check_varlen(query, key, value, cu_seq_q, cu_seq_k, window_size, enable_gqa, score_mod, paged)
    checks.check_longest("max_q", max_q, cu_seq_q)
    checks.check_longest("max_k", max_k, cu_seq_k)
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
