"""Attention through a window that drops its oldest keys, with or without kept ones: what a sink is needed for.

Dimension letters: B sequences, H query heads, S queries, T = S keys, D and Dv head dims.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from sm_flex.checks.tensors import check_qkv, check_scale, check_visible
from sm_flex.diagnostics.calls import check_count
from sm_flex.dropins.sdpa import scaled_dot_product_attention
from sm_flex.score_mod import ScoreMod, StableMask, stablemask

MIN_ROWS = 64


def windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: StableMask | None,
    *,
    window: int,
    keep: int = 0,
    scale: float | None = None,
    visible: Tensor | None = None,
    sliding: int | None = None,
) -> Tensor:
    """Attention in which row i sees the ``window`` most recent keys, its own included, and the first ``keep`` slots.

    keep = 0 evicts the first token, as a plain sliding window does; keep = 4 is StreamingLLM's (Xiao et al., ICLR 2024). The
    masses, scores and rotations are those of the whole sequence: tokens keep their positions. In blocks of rows, which are
    handed the keys that they see: no S x T tensor is made.

    Args:
        query: (B, H, S, D). key: (B, Hkv, S, D). value: (B, Hkv, S, Dv).
        mask: the StableMask of the call, or None for plain causal attention.
        window: at least 1. keep: at least 0.
        scale: of the scores, 1/sqrt(D) where None.
        visible: boolean, broadcastable to (B, H, S, S), what is seen at all; None for all.
        sliding: the sliding window of the layer itself, which hides kept slots too; None for none.

    Returns:
        (B, H, S, Dv), in query's dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: as the drop-ins, naming the argument, the rule, what came
            and the way out.

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 4)
        >>> windowed_attention(q, k, torch.eye(4).expand(1, 1, 4, 4), None, window=1, keep=1)[0, 0]
        tensor([[1.0000, 0.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000, 0.0000],
                [0.5000, 0.0000, 0.5000, 0.0000],
                [0.5000, 0.0000, 0.0000, 0.5000]])
    """
    _check(query, key, value, mask, window, keep, scale, visible, sliding)
    length, device = query.shape[2], query.device
    mask = stablemask(math.inf, length=1) if mask is None else mask
    if visible is not None:
        visible = visible.reshape((1,) * (4 - visible.dim()) + visible.shape)
    outs, size = [], max(MIN_ROWS, window)
    for start in range(0, length, size):
        end = min(start + size, length)
        oldest = max(0, start - window + 1)
        kept = torch.arange(min(keep, oldest), device=device)
        slots = torch.cat([kept, torch.arange(oldest, end, device=device)])
        rows = torch.arange(start, end, device=device).unsqueeze(1)
        seen = ((slots <= rows) & ((rows - slots < window) | (slots < keep)))[None, None]
        if sliding is not None:
            seen = seen & (rows - slots < sliding)
        if visible is not None:
            seen = seen & (visible[:, :, start:end] if visible.shape[2] > 1 else visible)[..., _at(visible, slots)]
        out = scaled_dot_product_attention(
            query[:, :, start:end], key[:, :, slots], value[:, :, slots], attn_mask=seen, scale=scale, enable_gqa=True,
            score_mod=_of_rows(mask, length, start, slots, end),
        )  # fmt: skip
        outs.append(out)
    return torch.cat(outs, 2) if outs else torch.zeros_like(query[..., : value.shape[-1]])


def _at(visible: Tensor, slots: Tensor) -> Tensor:
    return slots if visible.shape[3] > 1 else torch.zeros_like(slots)


def _of_rows(mask: StableMask, length: int, start: int, slots: Tensor, end: int) -> StableMask:
    """The mask of rows start..end-1, whose keys are those in slots."""
    device = slots.device
    positions = torch.arange(start, end, device=device) if mask.positions is None else mask.positions[..., start:end]
    sink = mask.sink
    if sink is not None and sink.dim() > 1 and sink.shape[-1] > 1:
        sink = sink[..., start:end]
    inner = mask.score_mod
    return replace(
        mask, positions=positions, length=length if mask.length is None else mask.length, sink=sink, _copies={},
        score_mod=None if inner is None else _at_slots(inner, start, slots),
    )  # fmt: skip


def _at_slots(inner: ScoreMod, start: int, slots: Tensor) -> ScoreMod:
    """inner, told the row and the slot in the whole sequence."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return inner(score, b, h, q_idx + start, slots[kv_idx])

    return score_mod


def _check(
    query: Tensor, key: Tensor, value: Tensor, mask: StableMask | None, window: int, keep: int, scale: float | None,
    visible: Tensor | None, sliding: int | None,
) -> None:  # fmt: skip
    if mask is not None and not isinstance(mask, StableMask):
        raise TypeError(f"mask must be a StableMask, or None for plain causal attention, got {type(mask).__name__}")
    if mask is not None and not mask.ordered:
        raise NotImplementedError("windowed_attention is for slots that follow the sequence, got a mask with ordered=False")
    check_qkv(query, key, value, True, "BHSD")
    check_scale(scale)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"windowed_attention takes whole sequences, got S={query.shape[2]} queries and T={key.shape[2]} keys: pass one full "
            "pass, without a cache"
        )
    if window is None or keep is None:
        raise ValueError("window and keep must be ints, got None: without a window call scaled_dot_product_attention")
    for name, x, least in (("window", window, 1), ("keep", keep, 0), ("sliding", sliding, 1)):
        check_count(name, x, least)
    if visible is not None:
        if not isinstance(visible, Tensor):
            raise TypeError(f"visible must be a boolean tensor or None, got {type(visible).__name__}")
        check_visible(visible, query, key)
