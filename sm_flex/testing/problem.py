"""A problem for a StableMask attention as a handful of numbers, so that one that fails can be printed and pasted.

    Problem(heads=2, num_queries=3, num_keys=3, gamma=0.5, length=8).arguments

Its tensors follow from the seed. Slots and positions are two things: query i sits at slot i + T - S, which says what it
sees; its position says what mass it carries.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sm_flex.testing.old_names import renamed

# What a problem may have beyond equal lengths, one key head for each query head, and causality: grouped heads, positions,
# a boolean mask, a scale, a sink, a value that the sink carries.
FEATURES = ("grouped", "positions", "visible", "scale", "sink", "sink_value")


@dataclass(frozen=True, repr=False)
class Problem:
    """One problem. ``arguments`` are the tensors; B = batch, H = heads, S = num_queries, T = num_keys, D = head_dim.

    gamma: one number for every head, or one per head. length: N, the training length.
    starts: the position of slot 0, for all or for each row of the batch; below 0 for left padding (positions are clamped
        at 0). None, where S = T and there are no documents: no positions are given, which means 0..S-1.
    documents: the slots at which a new packed document starts, beside 0; positions restart there.
    window: a query sees its own slot and this many before it; -1 for all.
    hidden: the part of the keys that a random mask hides, which leaves rows without any.
    scale: of the scores, None for 1/sqrt(D). spread: a factor on q, and so on the size of the scores.
    sink: one pseudo score for every head, or one per head; None for no sink.
    sink_values: how many values the sink has, kv_heads or heads; 0 for none.
    cut: where the laws that cut a sequence cut it, modulo its length.
    """

    seed: int = 0
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    num_queries: int = 1
    num_keys: int = 1
    head_dim: int = 1
    gamma: float | tuple[float, ...] = 0.5
    length: int = 1
    starts: tuple[int, ...] | None = None
    documents: tuple[int, ...] = ()
    window: int = -1
    hidden: float = 0.0
    scale: float | None = None
    spread: float = 1.0
    sink: float | tuple[float, ...] | None = None
    sink_values: int = 0
    cut: int = 0
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def __repr__(self) -> str:
        """The code that makes it (inf is math.inf)."""
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Problem({', '.join(f'{name}={value!r}' for name, value in given)})"

    but, rates = renamed("but", "replace"), renamed("rates", "gamma_H")

    def replace(self, **changes: Any) -> "Problem":
        """The same problem but for the changes."""
        return replace(self, **changes)

    @property
    def arguments(self) -> dict[str, Any]:
        """What an attention is given: q (B, H, S, D); k, v (B, Hkv, T, D); gamma (H,); length; positions; visible; scale.

        And sink (H,) and sink_value (H or Hkv, D), where there is one.
        """
        q, k, v = self.qkv
        arguments = {
            "q": q, "k": k, "v": v, "gamma": self.gamma_H, "length": self.length,
            "positions": self.positions, "visible": self.visible, "scale": self.scale,
        }  # fmt: skip
        if self.sink is None:
            return arguments
        arguments["sink"] = self._each_head(self.sink)
        return {**arguments, "sink_value": self.sink_value_HD} if self.sink_values else arguments

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(heads: int, rows: int, factor: float = 1.0) -> Tensor:
            shape = (self.batch, heads, rows, self.head_dim)
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * factor).to(self.device, self.dtype)

        return (
            draw(self.heads, self.num_queries, self.spread),
            draw(self.kv_heads, self.num_keys),
            draw(self.kv_heads, self.num_keys),
        )

    @property
    def gamma_H(self) -> Tensor:
        """gamma, (H,) in float32, or in float64 for float64 inputs."""
        return self._each_head(self.gamma)

    @property
    def sink_value_HD(self) -> Tensor:
        """What the sink carries, (sink_values, D), of the dtype of gamma."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        value = torch.randn((self.sink_values, self.head_dim), generator=generator, dtype=torch.float64)
        return value.to(self.device, torch.promote_types(self.dtype, torch.float32))

    @property
    def slots(self) -> Tensor:
        return torch.arange(self.num_keys - self.num_queries, self.num_keys, device=self.device)

    @property
    def positions(self) -> Tensor | None:
        """(S,), or (B, S) for one start per row of the batch; None where none are given."""
        if self.starts is None and not self.documents:
            return None
        starts = torch.tensor(self.starts or (0,), device=self.device)
        positions = (self.slots - self._first_slot(self.slots) + starts.unsqueeze(1)).clamp(min=0)
        return positions[0] if len(starts) == 1 else positions

    @property
    def visible(self) -> Tensor | None:
        """(B, 1, S, T) bool, all that a query sees, causality included; None for causality alone."""
        if not self.documents and self.window == -1 and self.hidden == 0:
            return None
        slots, keys = self.slots.unsqueeze(1), torch.arange(self.num_keys, device=self.device)
        seen = (keys <= slots) & (self._first_slot(keys) == self._first_slot(slots))
        if self.window != -1:
            seen = seen & (slots - keys <= self.window)
        seen = seen.expand(self.batch, 1, *seen.shape)
        if self.hidden:
            generator = torch.Generator().manual_seed(self.seed + 1)
            seen = seen & (torch.rand(seen.shape, generator=generator).to(self.device) >= self.hidden)
        return seen.contiguous()

    def _each_head(self, x: float | tuple[float, ...]) -> Tensor:
        values = x if isinstance(x, tuple) else (x,) * self.heads
        return torch.tensor(values, dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)

    def _first_slot(self, slots: Tensor) -> Tensor:
        """The first slot of the document that each slot belongs to."""
        first = torch.zeros_like(slots)
        for start in self.documents:
            first = torch.where(slots >= start, start, first)
        return first
