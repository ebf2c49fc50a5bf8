"""Inputs drawn at random, and calls of sm_flex in the form that sm_flex.testing.gradients takes."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask

from sm_flex import flex_attention, stablemask
from sm_flex.testing.gradients import Attention

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


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


def leaves(*shape: int, dtype: torch.dtype = torch.float32, seed: int | None = None) -> list[Tensor]:
    """q, k and v of one shape, which require grad; with a seed the same ones every time."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


def gamma_of(heads: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """(H,), one per head, in float32, or in float64 beside float64 inputs."""
    return torch.linspace(0.02, 0.9, heads).to(device, dtype if dtype == torch.float64 else torch.float32)


def flex_with_lse(backend: str = "AUTO", block_mask: BlockMask | None = None, **kwargs: Any) -> Attention:
    """flex_attention with stablemask(gamma, **kwargs), as fn(q, k, v, gamma) -> (out, lse)."""

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor | None]:
        # A 0-d gamma that is not learned goes in as the number it is.
        number = gamma.dim() == 0 and not gamma.requires_grad
        out, aux = flex_attention(
            q, k, v, score_mod=stablemask(gamma.item() if number else gamma, **kwargs), enable_gqa=True,
            block_mask=block_mask, kernel_options={"BACKEND": backend}, return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        return out, aux.lse

    return run


def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score - torch.exp2(-(h + 1.0)) * (q_idx - kv_idx)


def alibi_bias(heads: int, num_rows: int) -> Tensor:
    """What alibi adds to the scores, (1, H, S, S)."""
    distance = torch.arange(num_rows).unsqueeze(1) - torch.arange(num_rows)
    return -(2.0 ** -(torch.arange(heads) + 1.0)).reshape(1, heads, 1, 1) * distance


def documents(lengths: list[int], device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """cu_seqlens, the document of each row, and its position there."""
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return cu.to(device), ids.to(device), positions.to(device)


def packed(x: Tensor) -> Tensor:
    """(1, H, S, D) as varlen_attn takes it, (S, H, D)."""
    return x[0].transpose(0, 1)


def unpacked(x: Tensor) -> Tensor:
    """(S, H, D) as (1, H, S, D)."""
    return x.transpose(0, 1).unsqueeze(0)
