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
) -> tuple[Tensor, Tensor]:
    """out' (B, H, S, Dv) in q's dtype and lse' (B, H, S).

    log_mass broadcasts to (B, H, S); visible(first, end) gives rows of the mask, aligned if it shows no row i a key beyond
    i + T - S; bias broadcasts to (B, H, S, T).
    """
    batch, heads, num_rows, _ = q.shape
    num_keys = k.shape[2]
    dtype = log_mass.dtype
    wide_k, wide_v = k.to(dtype), v.to(dtype)
    if score_mod is not None:
        score_mod = vmap_bhqk(score_mod, scored=True)
    log_mass = log_mass.expand(*log_mass.shape[:-1], num_rows)

    def block(q_block: Tensor, start: int, keys: int) -> tuple[Tensor, Tensor]:
        end = start + q_block.shape[2]
        grouped = (q_block.to(dtype) * scale).reshape(batch, k.shape[1], heads // k.shape[1] * (end - start), q.shape[-1])
        scores = (grouped @ wide_k[:, :, :keys].transpose(-1, -2)).reshape(batch, heads, end - start, keys)
        if bias is not None:
            part = bias[..., :keys] if bias.shape[-1] > 1 else bias
            scores = scores + (part[..., start:end, :] if bias.shape[-2] > 1 else part)
        if score_mod is not None:
            b, h, kv = [torch.arange(n, device=q.device) for n in (batch, heads, keys)]
            scores = score_mod(scores, b, h, torch.arange(start, end, device=q.device), kv).to(dtype)
        scores = torch.where(visible(start, end)[..., :keys], scores, -torch.inf)
        dead = torch.isneginf(scores).all(-1)
        scores = scores.masked_fill(dead.unsqueeze(-1), 0.0)
        weights = torch.softmax(scores, dim=-1).masked_fill(dead.unsqueeze(-1), 0.0)
        lse = torch.logsumexp(scores, dim=-1).masked_fill(dead, -torch.inf)
        if dropout_p > 0:
            weights = torch.dropout(weights, dropout_p, train=True)
        out = (weights.reshape(*grouped.shape[:-1], keys) @ wide_v[:, :, :keys]).reshape(*q_block.shape[:-1], v.shape[-1])
        out, lse = remask(out, lse, log_mass[..., start:end])
        return out.to(q.dtype), lse

    if torch.compiler.is_compiling():
        return block(q, 0, num_keys)
    rows = max(MIN_ROWS, BLOCK_SCORES // max(1, batch * heads * num_keys))
    if rows >= num_rows:
        return block(q, 0, num_keys)
    blocks, start = [], 0
    # split(), whose backward puts the blocks' gradients side by side; a slice's fills a whole q with zeros.
    for q_block in q.split(rows, dim=2):
        end = start + q_block.shape[2]
        keys = min(max(1, end + num_keys - num_rows), num_keys) if aligned else num_keys
        if torch.is_grad_enabled():
            # Each block is computed again in the backward: no S x T matrix is kept.
            blocks.append(checkpoint(block, q_block, start, keys, use_reentrant=False, preserve_rng_state=dropout_p > 0))
        else:
            blocks.append(block(q_block, start, keys))
        start = end
    outs, lses = zip(*blocks, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)
