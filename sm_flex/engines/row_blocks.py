"""Attention in blocks of queries, for engines that would otherwise hold S x T elements."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_row_blocks(
    block: Callable[..., tuple[Tensor, Tensor | None]],
    q_BHSD: Tensor,
    rows: int,
    *reads: Tensor | None,
    preserve_rng: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """out and lse of block(rows of q, the first of them, *reads), side by side.

    Each block is computed again in the backward, so that what it holds is not kept. reads is all that it
    reads beside q: as arguments of the checkpoint they are saved, and autograd raises where one was written
    to before the backward.
    """
    outs, lses = [], []
    # split(), whose backward puts the blocks' gradients side by side; a slice's fills a whole q with zeros.
    for i, q_block in enumerate(q_BHSD.split(rows, dim=2)):
        inputs = (q_block, i * rows, *reads)
        if torch.is_grad_enabled():
            out, lse = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng)  # pyright: ignore
        else:
            out, lse = block(*inputs)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2), None if lses[0] is None else torch.cat(lses, dim=2)
