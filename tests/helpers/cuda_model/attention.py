"""The arithmetic that the kernels have in common, in float32 on the CPU, with their roundings to half precision.

The backward rebuilds P = exp(score - lse) from the lse it is given and dS = P * (dP - delta) from the delta it is given, as
every kernel does, so that what the caller hands it is all it goes by.

Shapes: q (B, H, S, D), k (B, Hk, T, D), v (B, Hk, T, Dv). visible: (S, T) bool or None. bias: broadcastable to (B, H, S, T).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tests.helpers.cuda_model.contract import HALF, ContractError


class Scores(NamedTuple):
    """What the scores of a call follow from."""

    q: Tensor
    k: Tensor
    scale: float
    visible: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self) -> Tensor:
        scores = self.q.float() @ repeated(self.k.float(), self.q.shape[1]).mT * self.scale
        if self.bias is not None:
            scores = scores + self.bias.float()
        return scores if self.visible is None else scores.masked_fill(~self.visible, -math.inf)


class Dropout(NamedTuple):
    """A draw that follows from the philox state alone, so that a backward can replay it."""

    p: float
    seed: int
    offset: int

    def keep(self, shape: torch.Size) -> Tensor:
        """0, or 1 / (1 - p)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.offset)
        return (torch.rand(shape, generator=generator) >= self.p).float() / (1 - self.p)


def forward(scores: Scores, v: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor, Tensor]:
    """out in float32, lse, and which rows are fully masked; what out and lse hold there is the kernel's own matter."""
    s = scores()
    masked = torch.isneginf(s).all(-1)
    lse = torch.logsumexp(s, -1)
    p = rounded(torch.softmax(s.masked_fill(masked.unsqueeze(-1), 0.0), -1), v.dtype)
    if dropout.p:
        p = p * dropout.keep(p.shape)
    return p @ repeated(v.float(), p.shape[1]), lse, masked


def backward(
    scores: Scores, v: Tensor, grad_out: Tensor, delta: Tensor, lse: Tensor, dropout: Dropout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk and dv of every query head, (B, H, T, D), and dS, in float32."""
    s, do = scores(), grad_out.float()
    heads, dtype = s.shape[1], v.dtype
    p = torch.exp(s - lse.unsqueeze(-1))
    dp = do @ repeated(v.float(), heads).mT
    weights = p
    if dropout.p:
        keep = dropout.keep(p.shape)
        weights, dp = p * keep, dp * keep
    ds = p * (dp - delta.unsqueeze(-1))
    half_ds = rounded(ds, dtype)
    dq = half_ds @ repeated(scores.k.float(), heads) * scores.scale
    dk = half_ds.mT @ scores.q.float() * scores.scale
    return dq, dk, rounded(weights, dtype).mT @ do, ds


def row_sums(out: Tensor, grad_out: Tensor) -> Tensor:
    """delta."""
    return (out.float() * grad_out.float()).sum(-1)


def summed(grad: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Of the query heads that share a key head, each rounded first, as mha_bwd's dk_expanded and dv_expanded are."""
    return rounded(grad, dtype).unflatten(1, (kv_heads, -1)).sum(2)


def repeated(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).float() if dtype in HALF else x


def bottom_right(rows: int, keys: int) -> Tensor:
    return torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)


def top_left(rows: int, keys: int) -> Tensor:
    return torch.ones(rows, keys, dtype=torch.bool).tril()


def memory_of(x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], what: str) -> Tensor:
    """x's memory as a kernel reads it that goes by these strides. Beyond the buffer it is an illegal access."""
    last = x.storage_offset() + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    size = x.untyped_storage().nbytes() // x.element_size()
    if last >= size:
        raise ContractError(f"{what}: reads element {last} of {size}, by strides {strides} instead of {x.stride()}")
    return torch.as_strided(x, shape, strides, x.storage_offset())


def uninitialised(x: Tensor) -> Tensor:
    """A new buffer in the layout of x, full of NaN."""
    return torch.full_like(x, math.nan)


def drawn(dropout_p: float) -> tuple[int, int]:
    """A philox seed and offset, from PyTorch's generator where there is dropout."""
    if not dropout_p:
        return 0, 0
    seed, offset = torch.randint(1, 1 << 20, (2,)).tolist()
    return seed, offset
