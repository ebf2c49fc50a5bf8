"""torch's flex_attention on a GPU: any inner score_mod and BlockMask. It differentiates through its log-sum-exp, so
remask's own backward closes the chain. As with torch's own, call it under torch.compile: eagerly it is not fused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from sm_flex.epilogue.remask import epilogue, remask
from sm_flex.mass.table import Mass
from sm_flex.visibility.blocks import narrow_block_mask


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mass: Mass,
    *,
    scale: float,
    score_mod: Callable[..., Tensor] | None,
    block_mask: BlockMask | None,
    ordered: bool,
    kernel_options: dict[str, Any],
    max_scores: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out' (B, H, S, Dv), lse' (B, H, S) and, if asked for, the largest score of each row of A_SM (B, H, S)."""
    narrowed = narrow_block_mask(block_mask, q.shape[2], k.shape[2], q.device) if ordered else block_mask
    out, aux = flex_attention(  # pyright: ignore[reportCallIssue]
        q, k, v, score_mod, narrowed, scale, q.shape[1] != k.shape[1],
        kernel_options=kernel_options or None,  # pyright: ignore[reportArgumentType]
        return_aux=AuxRequest(lse=True, max_scores=max_scores),
    )  # fmt: skip
    if mass.learned or (torch.is_grad_enabled() and out.requires_grad):
        new_out, lse = remask(out, aux.lse, mass.table(torch.float32))
    else:
        new_out, lse = epilogue(out, aux.lse, mass, in_place=True)
    return new_out, lse, _row_max(aux.max_scores, mass) if max_scores else None


def _row_max(real: Tensor, mass: Mass) -> Tensor:
    """The largest pseudo score of row p is -(p+1) gamma, wherever it has one (or the last, for a gamma below 0)."""
    positions = mass.positions
    if positions is None:
        positions = torch.arange(mass.num_queries, device=real.device)
    if positions.dim() == 2:
        positions = positions.unsqueeze(1)
    gamma = mass.gamma.to(real.dtype).reshape(-1, 1)
    last = torch.where(positions < mass.length, mass.length - 1, positions + 1)
    largest = torch.maximum(-(positions + 1) * gamma, -last * gamma)
    return torch.maximum(real, largest.masked_fill(positions == mass.length - 1, -torch.inf))
