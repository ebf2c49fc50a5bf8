"""StableMask in plain PyTorch, in blocks of rows: any device, dtype, inner score_mod, mask and dropout.

The engine of last resort. It differentiates through its log-sum-exp, as of the others only flex does. Scores
are float32 (float64 for float64 inputs). Under torch.compile it is one block: a number of blocks that follows
the length would compile anew for each length.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sm_flex.engines import Need
from sm_flex.engines.row_blocks import chained_first_keys, in_row_blocks, plain_first_keys
from sm_flex.epilogue.remask import remask_by_mass
from sm_flex.mass.table import Mass
from sm_flex.runtime import score_dtype, softmax_backward_op
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
    wide_k, wide_v = k_BHTD.to(dtype), v_BHTD.to(dtype)
    weigh = weights_by_rows(visible, scale=scale, bias=bias, score_mod=score_mod)

    spans = row_blocks(batch, heads, num_rows, num_keys)
    first_keys = chained_first_keys if len(spans) > 1 else plain_first_keys

    def block(q_block: Tensor, k: Tensor, v: Tensor, start: int, *_: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = q_block.shape[2]
        keys = min(max(1, start + rows + num_keys - num_rows), num_keys) if aligned else num_keys
        k_part, k = first_keys(k, keys)
        weights, lse = weigh(q_block, k_part, start)
        if dropout_p > 0:
            weights = torch.dropout(weights, dropout_p, train=True)
        grouped = weights.reshape(batch, kv_heads, heads // kv_heads * rows, keys)
        # Here and not beside k's: the backward is done with the gradient of v_part before it makes others.
        v_part, v = first_keys(v, keys)
        out = (grouped @ v_part).reshape(batch, heads, rows, v_BHTD.shape[-1])
        out, lse = remask_by_mass(out, lse, mass.rows(start, start + rows))
        return out.to(q_BHSD.dtype), lse, k, v

    if len(spans) == 1:
        return block(q_BHSD, wide_k, wide_v, 0)[:2]
    read = (bias, reads, mass.sink_HS, mass.sink_value_HD)
    return in_row_blocks(block, q_BHSD, wide_k, wide_v, spans[0][1], *read, preserve_rng=dropout_p > 0)


def row_blocks(batch: int, heads: int, num_rows: int, num_keys: int) -> list[tuple[int, int]]:
    """(first row, end row) of each block: about BLOCK_SCORES scores, all rows under torch.compile."""
    if torch.compiler.is_compiling():
        return [(0, num_rows)]
    rows = max(MIN_ROWS, BLOCK_SCORES // max(1, batch * heads * num_keys))
    if rows >= num_rows:
        return [(0, num_rows)]
    return [(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def weights_by_rows(
    visible: VisibleRows, *, scale: float, bias: Tensor | None = None, score_mod: Callable[..., Tensor] | None = None
) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """A function that computes ordinary attention's weights for a block of rows, before any mass.

    It takes (rows of q, the first K keys in the dtype of the scores, the first of the rows) and returns the
    weights (B, H, rows, K) and lse (B, H, rows). A fully masked row has weights 0 and lse -inf.
    """
    if score_mod is not None:
        score_mod = vmap_bhqk(score_mod, scored=True)

    def weigh(q_block: Tensor, k_part: Tensor, start: int) -> tuple[Tensor, Tensor]:
        batch, heads, rows, dim = q_block.shape
        kv_heads, keys = k_part.shape[1:3]
        end, device, dtype = start + rows, k_part.device, k_part.dtype
        grouped = (q_block.to(dtype) * scale).reshape(batch, kv_heads, heads // kv_heads * rows, dim)
        scores = (grouped @ k_part.transpose(-1, -2)).reshape(batch, heads, rows, keys)
        if bias is not None:
            scores = scores + bias_block(bias, start, end, keys)
        if score_mod is not None:
            b, h, kv = [torch.arange(n, device=device) for n in (batch, heads, keys)]
            scores = score_mod(scores, b, h, torch.arange(start, end, device=device), kv).to(dtype)
        return _Softmax.apply(scores, visible(start, end)[..., :keys])

    return weigh


class _Softmax(torch.autograd.Function):
    """Weights and log-sum-exp of the visible scores, of which the backward needs the weights alone.

    Autograd would keep five more tensors of their size, and need three more in the backward.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.where(seen, scores, -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)
        # The softmax of a fully masked row is NaN.
        weights = torch.softmax(scores, dim=-1).masked_fill_(torch.isneginf(lse).unsqueeze(-1), 0.0)
        ctx.save_for_backward(weights, seen)
        return weights, lse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad_weights, grad_lse = grad_outputs
        weights, seen = ctx.saved_tensors
        grad = softmax_backward_op(grad_weights, weights, -1, weights.dtype)
        # Filled, since 0 * NaN would let a NaN of one row reach the keys that it does not see.
        return grad.addcmul_(weights, grad_lse.unsqueeze(-1)).masked_fill_(~seen, 0.0), None
