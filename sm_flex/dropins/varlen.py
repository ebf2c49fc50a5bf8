"""torch.nn.attention.varlen.varlen_attn, with a score_mod for a StableMask."""

import inspect
from typing import Any, overload

import torch
import torch.nn.attention.varlen as torch_varlen
from torch import Tensor

from sm_flex.checks.fits import check_is_stablemask
from sm_flex.checks.packed import check_varlen
from sm_flex.checks.tensors import check_aux, check_scale
from sm_flex.dispatch import attend_packed
from sm_flex.engines.varlen import to_thd
from sm_flex.runtime import autocast, device_type
from sm_flex.score_mod import StableMask

_TORCHS_KEYWORDS = frozenset(inspect.signature(torch_varlen.varlen_attn).parameters)


# fmt: off
@overload
def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    return_aux: None = ..., scale: float | None = ..., window_size: tuple[int, int] = ..., enable_gqa: bool = ...,
    seqused_k: Tensor | None = ..., block_table: Tensor | None = ..., num_splits: int | None = ...,
    score_mod: StableMask | None = ...,
) -> Tensor: ...
@overload
def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    return_aux: torch_varlen.AuxRequest, scale: float | None = ..., window_size: tuple[int, int] = ..., enable_gqa: bool = ...,
    seqused_k: Tensor | None = ..., block_table: Tensor | None = ..., num_splits: int | None = ...,
    score_mod: StableMask | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on


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
    """torch.nn.attention.varlen.varlen_attn, and with ``score_mod=stablemask(gamma, length=N)`` eq. 11.

    out = (softmax(A * C + P) * C) V within each document. Works on a CPU too. A document's queries are
    aligned to the end of its keys.

    Args:
        query: (T_q, H, D). key, value: (T_k, Hkv, D) and (T_k, Hkv, Dv); Hkv < H needs enable_gqa.
        cu_seq_q, cu_seq_k: (documents + 1,) int32, the first row of each document and the total.
        max_q, max_k: the longest document's length.
        return_aux: AuxRequest(lse=True) also returns the natural log-sum-exp of the whole row of A_SM, (H,
            T_q).
        scale: of the scores, 1/sqrt(D) where None.
        window_size: with a StableMask (-1, 0), or (W, 0) for the query's own key and the W before it.
        seqused_k, block_table, num_splits: as in torch, on CUDA with a torch that has them, for inference.
        score_mod: a StableMask with a length, or None for torch's own function. Its positions are (T_q,);
            None means that they restart at 0 in each document, whose query and key lengths must then be
            equal.

    Returns:
        (T_q, H, Dv) in query's dtype, or (out, lse).

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule, what came and the way out.

    Example:
        >>> q = k = v = torch.randn(7, 2, 8)  # a document of 3 tokens and one of 4
        >>> cu = torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> mask = stablemask(0.5, length=16)
        >>> varlen_attn(q, k, v, cu, cu, 4, 4, window_size=(-1, 0), score_mod=mask).shape
        torch.Size([7, 2, 8])
    """
    new_keywords = {"enable_gqa": enable_gqa, "seqused_k": seqused_k, "block_table": block_table, "num_splits": num_splits}
    new_keywords = {name: x for name, x in new_keywords.items() if x is not None and x is not False}
    documents: tuple[Any, Any, Any, Any] = (cu_seq_q, cu_seq_k, max_q, max_k)
    if score_mod is None:
        missing = [name for name in new_keywords if name not in _TORCHS_KEYWORDS]
        if missing:
            raise NotImplementedError(f"{missing[0]} is not known to varlen_attn of torch {torch.__version__}: leave it out")
        keywords: Any = {"return_aux": return_aux, "scale": scale, "window_size": window_size, **new_keywords}
        return torch_varlen.varlen_attn(query, key, value, *documents, **keywords)
    check_is_stablemask(score_mod, "varlen_attn")
    query, key, value = autocast(query, key, value)
    check_aux(return_aux, torch_varlen.AuxRequest)
    paged = {name: x for name, x in new_keywords.items() if name != "enable_gqa"}
    check_varlen(query, key, value, *documents, score_mod, window_size, enable_gqa, paged)
    for name in paged:
        if name not in _TORCHS_KEYWORDS or device_type(query.device) != "cuda":
            raise NotImplementedError(
                f"{name} needs a newer torch on CUDA, got torch {torch.__version__} on {query.device}: leave it out"
            )
    check_scale(scale)
    return_lse = return_aux is not None and return_aux.lse
    options: Any = {"scale": scale, "window": window_size[0], "paged": paged, "return_lse": return_lse}
    out, lse = attend_packed(query, key, value, *documents, score_mod, **options)
    if return_lse:
        assert lse is not None
        return to_thd(out), lse.squeeze(0)
    return to_thd(out)
