"""torch's flex_attention on a GPU: any inner score_mod and BlockMask.

It differentiates through its log-sum-exp, so remask's own backward closes the chain. As with torch's own,
call it under torch.compile: eagerly it is not fused.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from sm_flex.engines import Need
from sm_flex.epilogue.remask import epilogue, remask_by_mass
from sm_flex.mass.table import Mass
from sm_flex.runtime import BEFORE_2_14, differentiable
from sm_flex.score_mod import StableMask
from sm_flex.visibility.blocks import narrow_block_mask


def refuses(need: Need) -> str | None:
    if need.device != "cuda":
        return f"torch's flex kernels train on CUDA only, query is on {need.q.device}"
    if need.backend == "FLASH" and BEFORE_2_14:
        return "its log-sum-exp is wrong by ln 2 before torch 2.14"
    if need.empty:
        return "it takes no empty tensor"
    if need.attn_mask is not None:
        return "it takes no attn_mask"
    if need.dropout_p:
        return "it has no dropout"
    # Where flex is asked for by name, or by options of its own, torch says by itself what it takes.
    asked_for = need.flex_options or need.backend != "AUTO"
    return "it has no float64" if need.dtype == torch.float64 and not asked_for else None


def attend(
    q_BHSD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    mask: StableMask,
    mass: Mass,
    *,
    scale: float,
    block_mask: BlockMask | None,
    kernel_options: dict[str, Any],
    max_scores: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out' (B, H, S, Dv), lse' (B, H, S) and, where wanted, the largest score of each row of A_SM (B, H, S)."""
    num_queries, num_keys, device = q_BHSD.shape[2], k_BHTD.shape[2], q_BHSD.device
    if mask.ordered:
        block_mask = narrow_block_mask(block_mask, num_queries, num_keys, device)
    arguments: Any = (q_BHSD, k_BHTD, v_BHTD, mask.score_mod, block_mask, scale, q_BHSD.shape[1] != k_BHTD.shape[1])
    options: Any = {"kernel_options": kernel_options or None, "return_aux": AuxRequest(lse=True, max_scores=max_scores)}
    out, aux = flex_attention(*arguments, **options)
    row_max = None
    if max_scores:
        row_max = torch.maximum(aux.max_scores, mask.largest_pseudo_score(device, num_queries, num_keys))
    if differentiable(out, mass.log_mass_HS, mass.sink_value_HD):
        return *remask_by_mass(out, aux.lse, mass.tabled(num_queries, torch.float32)), row_max
    return *epilogue(out, aux.lse, mass, in_place=True), row_max
