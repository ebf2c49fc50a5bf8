"""The decoder of benchmarks.lm: RoPE, RMSNorm, SwiGLU, and attention over packed documents by sm_flex.varlen_attn.

The one line that makes it a StableMask model is score_mod=self.mask in Attention.forward.

Shapes in names: T packed tokens of a batch, W width, H heads, D head dim, V = 256 bytes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lm_text import BYTES, SEPARATOR, Packed
from sm_flex import StableMask, varlen_attn


@dataclass(frozen=True)
class Size:
    """The model and its training. The defaults are for minutes on two CPU cores."""

    layers: int = 2
    width: int = 128
    heads: int = 4
    length: int = 256  # N
    rows: int = 2  # a batch: many small steps learn most from minutes
    validation_rows: int = 128
    validations: int = 10
    peak_lr: float = 3e-3


class Attention(nn.Module):
    def __init__(self, size: Size, mask: StableMask) -> None:
        super().__init__()
        self.heads, self.length, self.mask = size.heads, size.length, mask
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)

    def forward(self, x_TW: Tensor, rope: tuple[Tensor, Tensor], cu_seqlens: Tensor) -> Tensor:
        q_THD, k_THD, v_THD = self.qkv(x_TW).unflatten(1, (3, self.heads, -1)).unbind(1)
        # The whole of StableMask: score_mod in a call that is otherwise torch's own.
        out_THD = varlen_attn(
            rotate(q_THD, rope), rotate(k_THD, rope), v_THD, cu_seqlens, cu_seqlens, self.length, self.length,
            window_size=(-1, 0), score_mod=self.mask,
        )  # fmt: skip
        assert isinstance(out_THD, Tensor)
        return self.out(out_THD.flatten(1))


class SwiGLU(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        hidden = 8 * size.width // 3
        self.gate_up = nn.Linear(size.width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, size.width, bias=False)

    def forward(self, x_TW: Tensor) -> Tensor:
        gate, up = self.gate_up(x_TW).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, size: Size, mask: StableMask) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.RMSNorm(size.width, eps=1e-6), Attention(size, mask)
        self.norm_2, self.mlp = nn.RMSNorm(size.width, eps=1e-6), SwiGLU(size)
        # Each block starts as the identity.
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(self.mlp.out.weight)

    def forward(self, x_TW: Tensor, rope: tuple[Tensor, Tensor], cu_seqlens: Tensor) -> Tensor:
        x_TW = x_TW + self.attention(self.norm_1(x_TW), rope, cu_seqlens)
        return x_TW + self.mlp(self.norm_2(x_TW))


class Decoder(nn.Module):
    """Bytes and the separator in, scores of the next byte out. Its first loss is ln 256: the head starts at 0."""

    def __init__(self, size: Size, mask: StableMask) -> None:
        super().__init__()
        self.head_dim = size.width // size.heads
        self.embed = nn.Embedding(BYTES + 1, size.width)
        self.blocks = nn.ModuleList(Block(size, mask) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width, eps=1e-6)
        self.head = nn.Linear(size.width, BYTES, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, batch: Packed) -> Tensor:
        x_TW = self.embed(batch.tokens_T)
        rope = rope_table(batch.positions_T, self.head_dim)
        for block in self.blocks:
            x_TW = block(x_TW, rope, batch.cu_seqlens)
        return self.head(self.norm(x_TW))

    def loss(self, batch: Packed) -> Tensor:
        """Mean nats a byte."""
        logits_TV = self(batch)
        return F.cross_entropy(logits_TV.float(), batch.targets_T, ignore_index=SEPARATOR)


def rope_table(positions_T: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin (T, 1, D/2) of RoPE's angles."""
    rates = 10000.0 ** -torch.linspace(0, 1, head_dim // 2 + 1, device=positions_T.device)[:-1]
    angles = positions_T[:, None, None] * rates
    return angles.cos(), angles.sin()


def rotate(x_THD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    a, b = x_THD.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x_THD)  # the table is float32
