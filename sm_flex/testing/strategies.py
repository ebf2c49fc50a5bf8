"""hypothesis strategies: requests for StableMask attention, drawn as dimensions and a seed.

Dimensions are drawn, not tensor elements: a shrunken example is a small problem, and its tensors follow from the seed.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass
class Request:
    """One drawn problem. Tensors are float64 on the CPU; ``kwargs`` are the oracle's beyond q, k, v."""

    seed: int
    batch: int
    heads: int
    kv_heads: int
    num_queries: int
    num_keys: int
    head_dim: int
    gamma: float | Tensor
    length: int
    positions: Tensor | None
    spread: float
    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(heads: int, rows: int) -> Tensor:
            return torch.randn(self.batch, heads, rows, self.head_dim, generator=generator, dtype=torch.float64)

        self.tensors = {
            "q": draw(self.heads, self.num_queries) * self.spread,
            "k": draw(self.kv_heads, self.num_keys),
            "v": draw(self.kv_heads, self.num_keys),
            "grad_out": draw(self.heads, self.num_queries),
            "grad_lse": draw(self.heads, self.num_queries)[..., 0],
        }

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tensors["q"], self.tensors["k"], self.tensors["v"]

    @property
    def kwargs(self) -> dict[str, Any]:
        return {"gamma": self.gamma, "length": self.length, "positions": self.positions}


LENGTHS = st.sampled_from((1, 2, 3, 5, 8, 13, 31, 32, 33, 64, 67))


@st.composite
def gammas(draw: st.DrawFn, heads: int) -> float | Tensor:
    """A scalar (0, tiny, ordinary, large, inf) or one a head."""
    scalar = st.sampled_from((0.0, 1e-8, 2.0**-8, 0.1, 0.5, 3.0, 1e4, float("inf")))
    if draw(st.booleans()):
        return draw(scalar)
    return torch.tensor([draw(scalar) for _ in range(heads)], dtype=torch.float64)


@st.composite
def requests(draw: st.DrawFn, square: bool | None = None, learnable: bool = False) -> Request:
    """A request. square: S = T with positions 0..S-1, or a chunk at the end of a longer cache; None draws either."""
    kv_heads, groups = draw(st.sampled_from(((1, 1), (1, 3), (2, 1), (3, 2), (5, 1))))
    heads = kv_heads * groups
    square = draw(st.booleans()) if square is None else square
    num_keys = draw(LENGTHS)
    num_queries = num_keys if square else draw(st.integers(1, num_keys))
    # Below, at and beyond the training length.
    length = max(1, num_keys + draw(st.sampled_from((-3, -1, 0, 1, 7, 200))))
    positions = None if square else torch.arange(num_keys - num_queries, num_keys)
    gamma = torch.tensor([draw(st.sampled_from((0.0, 1e-8, 0.1, 0.5, 3.0))) for _ in range(heads)]).double()
    return Request(
        seed=draw(st.integers(0, 2**31)),
        batch=draw(st.sampled_from((1, 2, 3))),
        heads=heads,
        kv_heads=kv_heads,
        num_queries=num_queries,
        num_keys=num_keys,
        head_dim=draw(st.sampled_from((1, 4, 7, 16))),
        gamma=gamma if learnable else draw(gammas(heads)),
        length=length,
        positions=positions,
        spread=draw(st.sampled_from((0.0, 1.0, 5.0))),
    )
