"""The rule as a bias, for kernels that add one to the scores: -inf where a key is not visible.

Shapes: a bias is (1|B, 1|H, S, T).
"""

import math

import torch
from torch import Tensor

from sm_flex.visibility.rows import causal_rows

# How many elements of a bias are looked at together.
BLOCK_ELEMENTS = 1 << 20


def flag_or_bias(attn_mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor | None, bool]:
    """(bias, causal flag) for a kernel that takes one of them, and aligns its causal flag to the start.

    A single query sees every key: it needs neither.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    if attn_mask is None and num_queries in (1, num_keys):
        return None, num_queries > 1
    return causal_bias(attn_mask, num_queries, num_keys, q.dtype, q.device), False


def causal_bias(attn_mask: Tensor | None, num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """attn_mask narrowed to the causal slots, as a bias.

    A floating attn_mask keeps its dtype: rounded to bf16, -300.4 is -300.
    """
    causal = causal_rows(num_queries, num_keys, device)(0, num_queries).reshape(1, 1, num_queries, num_keys)
    if attn_mask is not None and attn_mask.is_floating_point():
        return torch.where(causal, attn_mask, -math.inf)
    seen = causal if attn_mask is None else causal & attn_mask
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -math.inf)


def mask_bias(attn_mask: Tensor, num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor:
    """attn_mask as a bias, for a kernel that is causal by itself. A broadcast mask stays a view."""
    bias = attn_mask
    if attn_mask.dtype == torch.bool:
        bias = torch.zeros(attn_mask.shape, dtype=dtype, device=attn_mask.device).masked_fill_(~attn_mask, -math.inf)
    return bias.expand(*bias.shape[:2], num_queries, num_keys)


def bias_block(bias: Tensor, start: int, end: int, num_keys: int) -> Tensor:
    """Rows start to end of a bias or mask (..., 1|S, 1|T), for the first keys."""
    part = bias[..., :num_keys] if bias.shape[-1] > 1 else bias
    return part[..., start:end, :] if bias.shape[-2] > 1 else part


def fully_masked_rows(bias: Tensor, causal: bool) -> Tensor:
    """(1|B, 1|H, S), True where the bias, with the kernel's causal flag if set, leaves a row no visible key."""
    num_queries, num_keys = bias.shape[-2:]

    def rows(start: int, end: int) -> Tensor:
        hidden = torch.isneginf(bias[..., start:end, :])
        return (hidden | ~causal_rows(num_queries, num_keys, bias.device)(start, end)).all(-1)

    if not causal:
        return torch.isneginf(bias.amax(-1))
    if bias.stride(-2) == 0 and num_queries > 1:
        return (~torch.isneginf(bias[..., 0, :])).cumsum(-1) == 0
    # Compiled code fuses this, and a number of blocks that follows the length would compile anew for each
    # length.
    if torch.compiler.is_compiling():
        return rows(0, num_queries)
    step = max(1, BLOCK_ELEMENTS // max(1, num_keys * bias.shape[0] * bias.shape[1]))
    return torch.cat([rows(start, min(start + step, num_queries)) for start in range(0, num_queries, step)], dim=-1)


def banded_bias(first_slot: int, num_rows: int, num_keys: int, window: int, dtype: torch.dtype, right: int = 0) -> Tensor:
    """(1, 1, rows, keys) on the CPU, for rows at the slots from first_slot on.

    A row sees the key of its own slot, the ``window`` keys before it and the ``right`` keys after it, or all
    of them where that is -1.
    """
    slots = torch.arange(first_slot, first_slot + num_rows).unsqueeze(1)
    keys = torch.arange(num_keys)
    seen = keys <= (num_keys if right == -1 else slots + right)
    if window != -1:
        seen = seen & (keys >= slots - window)
    return torch.zeros(1, 1, num_rows, num_keys, dtype=dtype).masked_fill_(~seen, -math.inf)
