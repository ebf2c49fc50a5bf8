"""StableMask in plain PyTorch, in blocks of rows: any device, any dtype, any inner score_mod, mask and dropout.

The engine of last resort, and the only one but flex that differentiates through its log-sum-exp. Scores are float32
(float64 for float64 inputs). Under torch.compile it is one block: a number of blocks that follows the length would
compile anew for each.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sm_flex.epilogue.remask import remask
from sm_flex.visibility.rows import VisibleRows, vmap_bhqk

# Scores held at a time, in elements.
BLOCK_SCORES = 1 << 19
MIN_ROWS = 16


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_mass: Tensor,
    visible: VisibleRows,
    *,
    scale: float,
    aligned: bool = True,
    bias: Tensor | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    dropout_p: float = 0.0,
    reads: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out' (B, H, S, Dv) in q's dtype and lse' (B, H, S).

    log_mass broadcasts to (B, H, S); visible(first, end) gives rows of the mask, aligned if it shows no row i a key beyond
    i + T - S; bias broadcasts to (B, H, S, T); reads is the mask behind visible, if it is one tensor.
    """
    batch, heads, num_rows, _ = q.shape
    kv_heads, num_keys = k.shape[1:3]
    wide_v = v.to(log_mass.dtype)
    weigh = weights_by_rows(k, visible, log_mass.dtype, scale=scale, bias=bias, score_mod=score_mod)
    log_mass = log_mass.expand(*log_mass.shape[:-1], num_rows)

    def block(q_block: Tensor, start: int, keys: int, *_: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = q_block.shape[2]
        weights, lse = weigh(q_block, start, keys)
        if dropout_p > 0:
            weights = torch.dropout(weights, dropout_p, train=True)
        grouped = weights.reshape(batch, kv_heads, heads // kv_heads * rows, keys)
        out = (grouped @ wide_v[:, :, :keys]).reshape(batch, heads, rows, v.shape[-1])
        out, lse = remask(out, lse, log_mass[..., start : start + rows])
        return out.to(q.dtype), lse

    spans = row_blocks(batch, heads, num_rows, num_keys)
    if len(spans) == 1:
        return block(q, 0, num_keys)
    blocks = []
    # split(), whose backward puts the blocks' gradients side by side; a slice's fills a whole q with zeros.
    for (start, end), q_block in zip(spans, q.split(spans[0][1], dim=2), strict=True):
        keys = min(max(1, end + num_keys - num_rows), num_keys) if aligned else num_keys
        if torch.is_grad_enabled():
            # Each block is computed again in the backward: no S x T matrix is kept. As its arguments, what it reads is
            # saved, and one written to before the backward raises.
            used = (start, keys, k, v, bias, reads)
            blocks.append(checkpoint(block, q_block, *used, use_reentrant=False, preserve_rng_state=dropout_p > 0))
        else:
            blocks.append(block(q_block, start, keys))
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
    k: Tensor,
    visible: VisibleRows,
    dtype: torch.dtype,
    *,
    scale: float,
    bias: Tensor | None = None,
    score_mod: Callable[..., Tensor] | None = None,
) -> Callable[[Tensor, int, int], tuple[Tensor, Tensor]]:
    """(rows of q, the first of them, K) -> ordinary attention's weights (B, H, rows, K) for the first K keys, and its lse
    (B, H, rows), before any mass.

    A row that sees nothing has weights 0 and lse -inf.
    """
    batch, kv_heads = k.shape[:2]
    wide_k = k.to(dtype)
    if score_mod is not None:
        score_mod = vmap_bhqk(score_mod, scored=True)

    def weigh(q_block: Tensor, start: int, keys: int) -> tuple[Tensor, Tensor]:
        heads, rows, dim = q_block.shape[1:]
        end = start + rows
        grouped = (q_block.to(dtype) * scale).reshape(batch, kv_heads, heads // kv_heads * rows, dim)
        scores = (grouped @ wide_k[:, :, :keys].transpose(-1, -2)).reshape(batch, heads, rows, keys)
        if bias is not None:
            part = bias[..., :keys] if bias.shape[-1] > 1 else bias
            scores = scores + (part[..., start:end, :] if bias.shape[-2] > 1 else part)
        if score_mod is not None:
            b, h, kv = [torch.arange(n, device=k.device) for n in (batch, heads, keys)]
            scores = score_mod(scores, b, h, torch.arange(start, end, device=k.device), kv).to(dtype)
        scores = torch.where(visible(start, end)[..., :keys], scores, -torch.inf)
        dead = torch.isneginf(scores).all(-1)
        scores = scores.masked_fill(dead.unsqueeze(-1), 0.0)
        weights = torch.softmax(scores, dim=-1).masked_fill(dead.unsqueeze(-1), 0.0)
        lse = torch.logsumexp(scores, dim=-1).masked_fill(dead, -torch.inf)
        return weights, lse

    return weigh
