"""torch.nn.attention.flex_attention.flex_attention, for a StableMask too."""

from typing import Any, Literal, overload

import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, FlexKernelOptions

from sm_flex import plans
from sm_flex.checks.fits import check_mask_fits
from sm_flex.checks.tensors import check_aux, check_block_mask, check_kernel_options, check_qkv, check_scale
from sm_flex.dispatch import attend, attend_planned
from sm_flex.runtime import autocast
from sm_flex.score_mod import ScoreMod, StableMask


# fmt: off
@overload
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: ScoreMod | StableMask | None = ...,
    block_mask: BlockMask | None = ..., scale: float | None = ..., enable_gqa: bool = ..., return_lse: Literal[False] = False,
    kernel_options: FlexKernelOptions | dict[str, Any] | None = ..., *, return_aux: None = ...,
) -> Tensor: ...
@overload
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: ScoreMod | StableMask | None = ...,
    block_mask: BlockMask | None = ..., scale: float | None = ..., enable_gqa: bool = ..., *, return_lse: Literal[True],
    kernel_options: FlexKernelOptions | dict[str, Any] | None = ..., return_aux: None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: ScoreMod | StableMask | None = ...,
    block_mask: BlockMask | None = ..., scale: float | None = ..., enable_gqa: bool = ..., return_lse: bool = ...,
    kernel_options: FlexKernelOptions | dict[str, Any] | None = ..., *, return_aux: AuxRequest,
) -> tuple[Tensor, AuxOutput]: ...
# fmt: on


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
    """torch.nn.attention.flex_attention.flex_attention, and with ``score_mod=stablemask(gamma)`` eq. 11.

    out = (softmax(A * C + P) * C) V, by the fastest library kernel that takes the call. Key j is visible to
    query i when j <= i + (T - S); block_mask narrows that.

    Args:
        query: (B, H, S, D). key, value: (B, Hkv, T, D) and (B, Hkv, T, Dv); Hkv < H needs enable_gqa.
        score_mod: a StableMask. With anything else this is torch's own function.
        block_mask: a BlockMask of (S, T): which of the causal slots are visible (documents, windows,
            padding). A static cache with unused slots needs one.
        scale: of the scores, 1/sqrt(D) where None.
        return_lse: also return lse'. As in torch, prefer return_aux.
        kernel_options: {"BACKEND": name} asks for one engine, and raises where it cannot serve the call. The
            names are FLASH_ATTENTION, CUDNN_ATTENTION, EFFICIENT_ATTENTION, MATH (plain PyTorch), and torch
            flex's own TRITON, TRITON_DECODE and FLASH. Other keys belong to torch's flex kernels and select
            them (CUDA).
        return_aux: AuxRequest(lse=True) also returns the natural log-sum-exp of the whole row of A_SM, (B, H,
            S) float32 (float64 for float64 inputs), differentiable. max_scores is served by torch's flex on
            CUDA only.

    Returns:
        (B, H, S, Dv) in query's dtype; with return_lse (out, lse), with return_aux (out, AuxOutput).

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule, what came and the way out.

    On CUDA an inner score_mod or a block_mask runs on torch's flex kernels, which want torch.compile around
    the call.

    Example:
        >>> q = k = v = torch.randn(1, 2, 5, 8)
        >>> out = flex_attention(q, k, v, score_mod=stablemask(headwise_gamma(2), length=16))
        >>> out.shape
        torch.Size([1, 2, 5, 8])
    """
    if not isinstance(score_mod, StableMask):
        arguments: Any = (score_mod, block_mask, scale, enable_gqa, return_lse, kernel_options)
        return torch_flex.flex_attention(query, key, value, *arguments, return_aux=return_aux)  # pyright: ignore
    kind = None
    if block_mask is None and kernel_options is None and type(enable_gqa) is bool and type(return_lse) is bool:
        kind = plans.kind_of(query, key, value, score_mod, scale, "flex", enable_gqa)
        plan = plans.find(kind)
        if plan is not None and return_aux is None:
            out, lse = attend_planned(query, key, value, score_mod, plan, return_lse=return_lse)
            return (out, lse) if lse is not None else out
    query, key, value = autocast(query, key, value)
    check_qkv(query, key, value, enable_gqa, "BHSD")
    if return_lse and return_aux is not None:
        raise ValueError("return_lse and return_aux ask for the same twice: use return_aux=AuxRequest(lse=True)")
    if block_mask is not None:
        check_block_mask(block_mask, query, key)
    check_aux(return_aux, AuxRequest)
    check_kernel_options(kernel_options)
    check_scale(scale)
    check_mask_fits(score_mod, query.shape[:3], key.shape[2], query.device, block_mask, values=value.shape[1::2])
    max_scores = return_aux is not None and return_aux.max_scores
    if max_scores and score_mod.sink is not None:
        raise NotImplementedError("max_scores is not known of a StableMask with a sink, which may be many scores: leave it out")
    wanted: Any = {"max_scores": max_scores, "return_lse": return_lse or (return_aux is not None and return_aux.lse)}
    options: Any = {"scale": scale, "block_mask": block_mask, "kernel_options": kernel_options}
    options["kind"] = None if max_scores else kind
    out, lse, row_max = attend(query, key, value, score_mod, **options, **wanted)
    if return_aux is not None:
        return out, AuxOutput(lse=lse if return_aux.lse else None, max_scores=row_max)
    if return_lse:
        assert lse is not None
        return out, lse
    return out
