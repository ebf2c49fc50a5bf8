"""The small decoder of the absolute-position tasks, and the position encodings that it is tried with.

A row of the paper's Table 4 is an encoding and a gamma: what tells the model where it is. All else is the
same.

Dimension letters: B sequences, H heads, S positions, D head dim, W width, C classes.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lm.model import rotate
from sm_flex import headwise_gamma, scaled_dot_product_attention, stablemask

T5_BUCKETS, T5_MAX_DISTANCE = 32, 128


@dataclass(frozen=True)
class Size:
    layers: int = 2
    width: int = 64
    heads: int = 4


class Row(NamedTuple):
    """encoding: learned, sinusoidal, alibi, t5, rope or urpe; gamma: inf (causal), a number, or headwise."""

    encoding: str
    gamma: float | str = math.inf


# Table 4, then what this project is about, then URPE (eq. 6) on top of RoPE, the baseline with parameters.
ROWS = {
    "learned": Row("learned"),
    "sinusoidal": Row("sinusoidal"),
    "alibi": Row("alibi"),
    "t5": Row("t5"),
    "rope": Row("rope"),
    "rope+stablemask-uniform": Row("rope", 0.5),
    "rope+stablemask-headwise": Row("rope", "headwise"),
    "alibi+stablemask-uniform": Row("alibi", 0.5),
    "alibi+stablemask-headwise": Row("alibi", "headwise"),
    "rope+urpe": Row("urpe"),
}


class Attention(nn.Module):
    def __init__(self, row: Row, size: Size, length: int) -> None:
        super().__init__()
        self.encoding, self.heads = row.encoding, size.heads
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        # gamma = inf leaves no mass: every row of the table goes through this one call.
        gamma = headwise_gamma(size.heads) if isinstance(row.gamma, str) else row.gamma
        self.mask = stablemask(gamma, length=length)
        if row.encoding == "urpe":
            self.toeplitz_HS = nn.Parameter(torch.ones(size.heads, length))

    def heads_of(self, x_BSW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BHSD, k_BHSD, v_BHSD = self.qkv(x_BSW).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.encoding in ("rope", "urpe"):
            turns = angles(x_BSW.shape[1], q_BHSD.shape[-1])
            q_BHSD, k_BHSD = (rotate(x, (turns.cos(), turns.sin())) for x in (q_BHSD, k_BHSD))
        return q_BHSD, k_BHSD, v_BHSD

    def forward(self, x_BSW: Tensor, bias_HSS: Tensor | None) -> Tensor:
        q_BHSD, k_BHSD, v_BHSD = self.heads_of(x_BSW)
        if self.encoding == "urpe":
            out_BHSD = urpe(q_BHSD, k_BHSD, v_BHSD, self.toeplitz_HS)
        else:
            out_BHSD = scaled_dot_product_attention(
                q_BHSD, k_BHSD, v_BHSD, attn_mask=bias_HSS, is_causal=bias_HSS is None, score_mod=self.mask
            )
        return self.out(out_BHSD.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, row: Row, size: Size, length: int) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(size.width), Attention(row, size, length)
        self.norm_2 = nn.LayerNorm(size.width)
        self.mlp = nn.Sequential(nn.Linear(size.width, 4 * size.width), nn.GELU(), nn.Linear(4 * size.width, size.width))

    def forward(self, x_BSW: Tensor, bias_HSS: Tensor | None) -> Tensor:
        x_BSW = x_BSW + self.attention(self.norm_1(x_BSW), bias_HSS)
        return x_BSW + self.mlp(self.norm_2(x_BSW))


class Decoder(nn.Module):
    """Two kinds of token in, (B, S, C) scores of the classes out."""

    def __init__(self, row: Row, size: Size, length: int, classes: int) -> None:
        super().__init__()
        self.encoding = row.encoding
        self.embed = nn.Embedding(2, size.width)
        if row.encoding == "learned":
            self.table_SW = nn.Parameter(torch.randn(length, size.width))
        if row.encoding == "t5":  # as in T5, one table for all layers
            self.bias_NH = nn.Parameter(torch.zeros(T5_BUCKETS, size.heads))
        self.heads = size.heads
        self.blocks = nn.ModuleList(Block(row, size, length) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, classes)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSW = self.embed(tokens_BS)
        length = tokens_BS.shape[1]
        if self.encoding == "learned":
            x_BSW = x_BSW + self.table_SW
        elif self.encoding == "sinusoidal":
            x_BSW = x_BSW + sinusoidal(length, x_BSW.shape[-1])
        bias_HSS = self.bias(length)
        for block in self.blocks:
            x_BSW = block(x_BSW, bias_HSS)
        return self.head(self.norm(x_BSW))

    def bias(self, length: int) -> Tensor | None:
        """What ALiBi and T5 add to the scores, (H, S, S); the causal part is the mask's."""
        positions = torch.arange(length)
        distance_SS = (positions[:, None] - positions).clamp(min=0)
        if self.encoding == "alibi":
            return -headwise_gamma(self.heads)[:, None, None] * distance_SS
        if self.encoding == "t5":
            return self.bias_NH[t5_bucket(distance_SS)].permute(2, 0, 1)
        return None


def angles(length: int, width: int) -> Tensor:
    """(S, W/2), of RoPE (Su et al. 2021) and of Vaswani et al. 2017, section 3.5."""
    return torch.arange(length)[:, None] * 10000.0 ** -(torch.arange(width // 2) / (width // 2))


def sinusoidal(length: int, width: int) -> Tensor:
    """(S, W)."""
    return torch.stack([angles(length, width).sin(), angles(length, width).cos()], dim=-1).flatten(1)


def t5_bucket(distance: Tensor) -> Tensor:
    """The bucket of a distance >= 0 (Raffel et al. 2020): half are a token wide, the rest logarithmic to 128."""
    exact = T5_BUCKETS // 2
    ratio = (distance.clamp(min=1) / exact).log() / math.log(T5_MAX_DISTANCE / exact)
    far = exact + (ratio * (T5_BUCKETS - exact)).long()
    return torch.where(distance < exact, distance, far.clamp(max=T5_BUCKETS - 1))


def urpe(q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, toeplitz_HS: Tensor) -> Tensor:
    """(softmax(A) o T) V, T[i, j] = t[i - j] (eq. 6; Luo et al. 2022), causal; t is learned, 1 at first."""
    length, dim = q_BHSD.shape[-2:]
    distance_SS = torch.arange(length)[:, None] - torch.arange(length)
    scores_BHSS = (q_BHSD @ k_BHSD.mT / math.sqrt(dim)).masked_fill(distance_SS < 0, -math.inf)
    return (F.softmax(scores_BHSS, dim=-1) * toeplitz_HS[:, distance_SS.clamp(min=0)]).type_as(v_BHSD) @ v_BHSD
