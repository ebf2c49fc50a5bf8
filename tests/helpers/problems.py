"""Shared by the tests: inputs drawn at random, and the comparison with the oracle from the kit."""

import torch
from torch import Tensor

from sm_flex.testing.compare import Attention as Attention
from sm_flex.testing.compare import check as check
from sm_flex.testing.compare import gradients as gradients


def qkv(
    batch: int,
    heads: int,
    kv_heads: int,
    num_queries: int,
    num_keys: int,
    dim: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    v_dim: int | None = None,
) -> list[Tensor]:
    shapes = ((heads, num_queries, dim), (kv_heads, num_keys, dim), (kv_heads, num_keys, v_dim or dim))
    return [torch.randn(batch, *shape, dtype=torch.float32).to(device=device, dtype=dtype) for shape in shapes]
