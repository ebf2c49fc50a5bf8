"""The CPU engine for a chunk of queries against a cache: one block of queries after another.

With S != T causality is a bias, which for all queries together would be S x T. This calls the autograd
Function, so it stands above it.
"""

import math

import torch
from torch import Tensor

from sm_flex.engines import Call, autograd
from sm_flex.engines.row_blocks import in_row_blocks
from sm_flex.mass.table import Mass
from sm_flex.visibility.bias import banded_bias, bias_block

# How many queries are attended together, and how many elements their bias may have.
ROWS, BIAS_ELEMENTS = 512, 1 << 20


def rows_together(num_queries: int, num_keys: int) -> int | None:
    """How many queries a block has, or None where all are one block, as they are under torch.compile."""
    if num_queries == num_keys or torch.compiler.is_compiling():
        return None
    rows = max(1, min(ROWS, BIAS_ELEMENTS // num_keys))
    return rows if num_queries > rows else None


def attend(
    q_BHSD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    mass: Mass,
    attn_mask: Tensor | None,
    scale: float,
    rows: int,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """As autograd.attend("cpu", ...), in blocks of rows."""
    num_queries, num_keys = q_BHSD.shape[2], k_BHTD.shape[2]

    def block(q_block: Tensor, start: int, *_: Tensor | None) -> tuple[Tensor, Tensor | None]:
        end = start + q_block.shape[2]
        keys = min(max(1, end + num_keys - num_queries), num_keys)
        bias = banded_bias(start + num_keys - num_queries, end - start, keys, -1, q_BHSD.dtype)
        if attn_mask is not None:
            part = bias_block(attn_mask, start, end, keys)
            bias = torch.where(part, bias, -math.inf) if part.dtype == torch.bool else bias + part
        k, v = k_BHTD[:, :, :keys], v_BHTD[:, :, :keys]
        call = Call(q_block, k, v, bias, None, None, causal=False, scale=scale)
        return autograd.attend("cpu", call, mass.rows(start, end), return_lse=return_lse)

    return in_row_blocks(block, q_BHSD, rows, k_BHTD, v_BHTD, attn_mask, mass.sink_HS, mass.sink_value_HD)
