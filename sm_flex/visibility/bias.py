"""The rule as a bias, for kernels that add one to the scores."""

import math

import torch
from torch import Tensor

from sm_flex.visibility.rows import causal_rows

# Elements of a mask that are looked at together.
BLOCK_ELEMENTS = 1 << 20


def causal_bias(attn_mask: Tensor | None, num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """attn_mask narrowed to the causal slots, as a bias (1|B, 1|H, S, T) with -inf where nothing is seen.

    A floating attn_mask keeps its dtype: rounded to bf16, -300.4 is -300.
    """
    causal = causal_rows(num_queries, num_keys, device)(0, num_queries).reshape(1, 1, num_queries, num_keys)
    if attn_mask is not None and attn_mask.is_floating_point():
        return torch.where(causal, attn_mask, -math.inf)
    seen = causal if attn_mask is None else causal & attn_mask
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -math.inf)


def mask_bias(attn_mask: Tensor, num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor:
    """attn_mask as a bias (1|B, 1|H, S, T) for a kernel that is causal by itself; a broadcast mask stays a view."""
    bias = attn_mask
    if attn_mask.dtype == torch.bool:
        bias = torch.zeros(attn_mask.shape, dtype=dtype, device=attn_mask.device).masked_fill_(~attn_mask, -math.inf)
    return bias.expand(*bias.shape[:2], num_queries, num_keys)


def dead_rows(bias: Tensor, causal: bool) -> Tensor:
    """(1|B, 1|H, S), True where the bias, or it and the kernel's own causality, leave a row nothing to see."""
    num_queries, num_keys = bias.shape[-2:]

    def rows(start: int, end: int) -> Tensor:
        unseen = torch.isneginf(bias[..., start:end, :])
        return (unseen | ~causal_rows(num_queries, num_keys, bias.device)(start, end) if causal else unseen).all(-1)

    if bias.stride(-2) == 0 and num_queries > 1:
        seen = ~torch.isneginf(bias[..., 0, :])
        return seen.cumsum(-1) == 0 if causal else ~seen.any(-1, keepdim=True).expand(*seen.shape[:-1], num_queries)
    if torch.compiler.is_compiling():  # fused, and a number of blocks that follows the length would compile anew for each
        return rows(0, num_queries)
    step = max(1, BLOCK_ELEMENTS // max(1, num_keys * bias.shape[0] * bias.shape[1]))
    return torch.cat([rows(start, min(start + step, num_queries)) for start in range(0, num_queries, step)], dim=-1)


def banded_bias(first_slot: int, num_rows: int, num_keys: int, window: int, dtype: torch.dtype) -> Tensor:
    """(1, 1, rows, keys) on the CPU: row r sits at slot first_slot + r and sees the keys of its last ``window`` and itself."""
    slots = torch.arange(first_slot, first_slot + num_rows).unsqueeze(1)
    keys = torch.arange(num_keys)
    seen = keys <= slots
    if window != -1:
        seen = seen & (keys >= slots - window)
    return torch.zeros(1, 1, num_rows, num_keys, dtype=dtype).masked_fill_(~seen, -math.inf)
