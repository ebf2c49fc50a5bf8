"""StableMask in plain PyTorch, in blocks of rows: any device, any dtype, any inner score_mod, mask and dropout.

The engine of last resort, and the only one but flex that differentiates through its log-sum-exp. Scores are float32
(float64 for float64 inputs). Under torch.compile it is one block: a number of blocks that follows the length would
compile anew for each.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sm_flex.remask import remask
from sm_flex.visibility import VisibleRows, vmap_bhqk

# Scores held at a time, in elements.
BLOCK_SCORES = 1 << 22
MIN_ROWS = 32


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_mass: Tensor,
    visible: VisibleRows,
    *,
    scale: float,
    bias: Tensor | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """out' (B, H, S, Dv) in q's dtype and lse' (B, H, S).

    log_mass broadcasts to (B, H, S); visible(first, end) gives rows of the mask; bias broadcasts to (B, H, S, T).
    """
    batch, heads, num_rows, _ = q.shape
    kv_heads, num_keys = k.shape[1:3]
    wide_v = v.to(log_mass.dtype)
    weigh = weights_by_rows(q, k, visible, log_mass.dtype, scale=scale, bias=bias, score_mod=score_mod)
    log_mass = log_mass.expand(*log_mass.shape[:-1], num_rows)

    def block(start: int, end: int) -> tuple[Tensor, Tensor]:
        weights, lse = weigh(start, end)
        if dropout_p > 0:
            weights = torch.dropout(weights, dropout_p, train=True)
        grouped = weights.reshape(batch, kv_heads, heads // kv_heads * (end - start), num_keys)
        out = (grouped @ wide_v).reshape(batch, heads, end - start, v.shape[-1])
        out, lse = remask(out, lse, log_mass[..., start:end])
        return out.to(q.dtype), lse

    spans = row_blocks(batch, heads, num_rows, num_keys)
    if len(spans) == 1:
        return block(0, num_rows)
    blocks = []
    for start, end in spans:
        if torch.is_grad_enabled():
            # Each block is computed again in the backward: no S x T matrix is kept.
            blocks.append(checkpoint(block, start, end, use_reentrant=False, preserve_rng_state=dropout_p > 0))
        else:
            blocks.append(block(start, end))
    outs, lses = zip(*blocks, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def row_blocks(batch: int, heads: int, num_rows: int, num_keys: int) -> list[tuple[int, int]]:
    """(first row, end row) of each block: about BLOCK_SCORES scores, all rows under torch.compile."""
    if torch.compiler.is_compiling():
        return [(0, num_rows)]
    rows = max(MIN_ROWS, BLOCK_SCORES // max(1, batch * heads * num_keys))
    if rows >= num_rows:
        return [(0, num_rows)]
    return [(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def weights_by_rows(
    q: Tensor,
    k: Tensor,
    visible: VisibleRows,
    dtype: torch.dtype,
    *,
    scale: float,
    bias: Tensor | None = None,
    score_mod: Callable[..., Tensor] | None = None,
) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """(first row, end row) -> ordinary attention's weights (B, H, rows, T) and its lse (B, H, rows), before any mass.

    A row that sees nothing has weights 0 and lse -inf.
    """
    batch, heads, _, dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    wide_k = k.to(dtype)
    if score_mod is not None:
        score_mod = vmap_bhqk(score_mod, scored=True)

    def weigh(start: int, end: int) -> tuple[Tensor, Tensor]:
        q_block = q[:, :, start:end].to(dtype) * scale
        grouped = q_block.reshape(batch, kv_heads, heads // kv_heads * (end - start), dim)
        scores = (grouped @ wide_k.transpose(-1, -2)).reshape(batch, heads, end - start, num_keys)
        if bias is not None:
            scores = scores + bias[..., start:end, :] if bias.shape[-2] > 1 else scores + bias
        if score_mod is not None:
            b, h, kv = [torch.arange(n, device=q.device) for n in (batch, heads, num_keys)]
            scores = score_mod(scores, b, h, torch.arange(start, end, device=q.device), kv).to(dtype)
        scores = torch.where(visible(start, end), scores, -torch.inf)
        dead = torch.isneginf(scores).all(-1)
        scores = scores.masked_fill(dead.unsqueeze(-1), 0.0)
        weights = torch.softmax(scores, dim=-1).masked_fill(dead.unsqueeze(-1), 0.0)
        lse = torch.logsumexp(scores, dim=-1).masked_fill(dead, -torch.inf)
        return weights, lse

    return weigh
