"""sm_flex.flex_attention."""

from typing import Any, Literal, overload

import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, FlexKernelOptions

from sm_flex.checks import call as checks
from sm_flex.dispatch import attend
from sm_flex.engines import choose
from sm_flex.runtime import autocast
from sm_flex.score_mod import ScoreMod, StableMask


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
    checks.check_qkv(query, key, value, enable_gqa, "BHSD")
    if return_lse and return_aux is not None:
        raise ValueError("return_lse and return_aux are one request twice: use return_aux=AuxRequest(lse=True)")
    if block_mask is not None:
        checks.check_block_mask(block_mask, query, key)
    checks.check_aux(return_aux, AuxRequest)
    checks.check_kernel_options(kernel_options)
    options: dict[str, Any] = dict(kernel_options or {})
    backend = options.pop("BACKEND", "AUTO")
    max_scores = return_aux is not None and return_aux.max_scores
    if max_scores and score_mod.sink is not None:
        raise NotImplementedError("max_scores is not known of a StableMask with a sink, which may be many scores: leave it out")
    want_lse = return_lse or (return_aux is not None and return_aux.lse)
    if backend in choose.FLEX_BACKENDS:
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
