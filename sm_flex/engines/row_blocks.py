"""Attention in blocks of queries, for the dense engine, which would otherwise hold S x T elements."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_row_blocks(
    block: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
    q_BHSD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    rows: int,
    *reads: Tensor | None,
    preserve_rng: bool = False,
) -> tuple[Tensor, Tensor]:
    """out and lse of block(rows of q, k, v, the first of the rows, *reads), side by side.

    A block returns (out, lse, k, v), where k and v are what chained_first_keys left for the next block. Each
    block is computed again in the backward, so that what it holds is not kept. reads is all that it reads
    beside q, k and v: as arguments of the checkpoint they are saved, and autograd raises where one was written
    to before the backward.
    """
    outs, lses = [], []
    # split(), whose backward puts the blocks' gradients side by side; a slice's fills a whole q with zeros.
    for i, q_block in enumerate(q_BHSD.split(rows, dim=2)):
        inputs = (q_block, k_BHTD, v_BHTD, i * rows, *reads)
        if torch.is_grad_enabled():
            result: Any = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng)
        else:
            result = block(*inputs)
        out, lse, k_BHTD, v_BHTD = result
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def plain_first_keys(x_BHTD: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """The first keys for a block, and all of them for the next."""
    return x_BHTD[:, :, :num_keys], x_BHTD


def chained_first_keys(x_BHTD: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """As plain_first_keys, for many blocks, of which each takes its keys from what the one before it left.

    The backward begins with the last block, and so can add the gradient of each to one tensor. A slice's
    backward would fill a tensor as large as all keys with zeros for each block, beside the sum so far.
    """
    if torch.is_grad_enabled() and x_BHTD.requires_grad:
        return _FirstKeys.apply(x_BHTD, num_keys)
    return plain_first_keys(x_BHTD, num_keys)


class _FirstKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
        ctx.shape, ctx.num_keys = x_BHTD.shape, num_keys
        ctx.set_materialize_grads(False)
        return x_BHTD[:, :, :num_keys], x_BHTD.view_as(x_BHTD)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, None]:
        part, total = grad_outputs
        if part is None:
            return total, None
        if total is None:
            total = part.new_zeros(ctx.shape)
        elif torch.is_grad_enabled():  # a second derivative reads what it was
            total = total.clone()
        total[:, :, : ctx.num_keys] += part  # in place: the next block's backward made it, and nobody else has it
        return total, None
