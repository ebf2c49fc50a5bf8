"""StableMask in plain PyTorch, in blocks of rows: any device, dtype, inner score_mod, mask and dropout.

The engine of last resort. It differentiates through its log-sum-exp, as of the others only flex does. Scores
are float32 (float64 for float64 inputs). Under torch.compile it is one block: a number of blocks that follows
the length would compile anew for each length.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sm_flex.engines import Need
from sm_flex.engines.row_blocks import in_row_blocks
from sm_flex.epilogue.remask import remask_by_mass
from sm_flex.mass.table import Mass
from sm_flex.runtime import score_dtype
from sm_flex.visibility.bias import bias_block
from sm_flex.visibility.rows import VisibleRows, vmap_bhqk

# How many scores are held at a time.
BLOCK_SCORES = 1 << 19
MIN_ROWS = 16


def refuses(need: Need) -> str | None:
    return "other kernel_options, and max_scores, belong to torch's flex kernels" if need.flex_options else None


def attend(
    q_BHSD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    mass: Mass,
    visible: VisibleRows,
    *,
    scale: float,
    aligned: bool = True,
    bias: Tensor | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    dropout_p: float = 0.0,
    reads: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out' (B, H, S, Dv) in q's dtype and lse' (B, H, S).

    The mass is a table that broadcasts to (B, H, S), bias to (B, H, S, T). visible(first, end) gives rows of the mask, and
    reads is the tensor behind it, if it is one. aligned: it shows no row i a key beyond i + T - S.
    """
    batch, heads, num_rows, _ = q_BHSD.shape
    kv_heads, num_keys = k_BHTD.shape[1:3]
    dtype = score_dtype(q_BHSD)
    wide_v = v_BHTD.to(dtype)
    weigh = weights_by_rows(k_BHTD, visible, dtype, scale=scale, bias=bias, score_mod=score_mod)

    def block(q_block: Tensor, start: int, *_: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = q_block.shape[2]
        keys = min(max(1, start + rows + num_keys - num_rows), num_keys) if aligned else num_keys
        weights, lse = weigh(q_block, start, keys)
        if dropout_p > 0:
            weights = torch.dropout(weights, dropout_p, train=True)
        grouped = weights.reshape(batch, kv_heads, heads // kv_heads * rows, keys)
        out = (grouped @ wide_v[:, :, :keys]).reshape(batch, heads, rows, v_BHTD.shape[-1])
        out, lse = remask_by_mass(out, lse, mass.rows(start, start + rows))
        return out.to(q_BHSD.dtype), lse

    spans = row_blocks(batch, heads, num_rows, num_keys)
    if len(spans) == 1:
        return block(q_BHSD, 0)
    read = (k_BHTD, v_BHTD, bias, reads, mass.sink_HS, mass.sink_value_HD)
    return in_row_blocks(block, q_BHSD, spans[0][1], *read, preserve_rng=dropout_p > 0)


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
    """A function that computes ordinary attention's weights for a block of rows, before any mass.

    It takes (rows of q, the first of them, K) and returns the weights (B, H, rows, K) of the first K keys and
    lse (B, H, rows). A fully masked row has weights 0 and lse -inf.
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
            scores = scores + bias_block(bias, start, end, keys)
        if score_mod is not None:
            b, h, kv = [torch.arange(n, device=k.device) for n in (batch, heads, keys)]
            scores = score_mod(scores, b, h, torch.arange(start, end, device=k.device), kv).to(dtype)
        scores = torch.where(visible(start, end)[..., :keys], scores, -torch.inf)
        masked = torch.isneginf(scores).all(-1)
        scores = scores.masked_fill(masked.unsqueeze(-1), 0.0)
        weights = torch.softmax(scores, dim=-1).masked_fill(masked.unsqueeze(-1), 0.0)
        lse = torch.logsumexp(scores, dim=-1).masked_fill(masked, -torch.inf)
        return weights, lse

    return weigh
