"""What benchmarks.lm compares: plain causal attention, StableMask, the paper's Table 3, and gpt-oss's sinks.

All are one call of sm_flex with another log M, but for the learned artificial token: that is plain causal
attention over rows that have one more token at their start (text.pack puts it there). A learned sink with a
value is close to it: what such a token gives to each head of each layer, if it looked the same to every query.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sm_flex import StableMask, headwise_gamma, log_mass, stablemask
from sm_flex.score_mod import ScoreMod


@dataclass(frozen=True)
class Variant:
    name: str
    label: str
    gamma: float | str = math.inf  # or "headwise"
    constant: float | None = None  # of every pseudo score
    sink: float | None = None  # one more pseudo score per row
    learned_sink: bool = False  # one per head, which starts at 0
    learned_value: bool = False  # what the learned sink carries, one per head, which starts at 0
    token: bool = False  # a learned token before every row
    kept: tuple[int, ...] = (0,)  # first tokens that window attention keeps, when texts get longer
    rescaled: bool = False  # out of attention, divided by the share that the row has where all scores are 0
    faded: bool = False  # the mass grows from e^-FADE of itself to itself over the first half of the training


ALL = (
    Variant("causal", "causal", kept=(0, 4)),
    Variant("stablemask", "StableMask, head-wise", gamma="headwise"),
    Variant("stablemask-0.5", "StableMask, gamma = 0.5", gamma=0.5),
    Variant("pseudo-0", "pseudo value 0", gamma=0.0),
    Variant("pseudo-0.01", "pseudo value 0.01", constant=0.01),
    Variant("token-fixed", "fixed artificial token", sink=0.0),
    Variant("token-learned", "learned artificial token", token=True, kept=(1,)),
    Variant("sink-learned", "learned sink per head", learned_sink=True),
    Variant("sink-value", "learned sink per head, with a value", learned_sink=True, learned_value=True),
)
# Not for use: to find out why StableMask gains or loses (why.py).
STUDIED = (
    Variant("stablemask-rescaled", "StableMask, rows rescaled to causal's size at the start", gamma="headwise", rescaled=True),
    Variant("stablemask-faded", "StableMask, mass brought in over half the training", gamma="headwise", faded=True),
)
BY_NAME = {variant.name: variant for variant in (*ALL, *STUDIED)}
FADE = 10.0


def named(name: str) -> Variant:
    """One of ALL, or stablemask-X for any gamma X."""
    if name in BY_NAME:
        return BY_NAME[name]
    try:
        gamma = float(name.removeprefix("stablemask-"))
        stablemask(gamma)
    except ValueError:
        known = ", ".join(v.name for v in ALL)
        raise ValueError(f"--variants: no such variant: {name}; there are {known}, stablemask-GAMMA, all") from None
    if not name.startswith("stablemask-"):
        raise ValueError(f"--variants: no such variant: {name}; did you mean stablemask-{name}?")
    return Variant(name, f"StableMask, gamma = {gamma:g}", gamma=gamma)


class Mass(nn.Module):
    """The variant's StableMask at given positions. Each layer has one, with its own learned sinks and values (H, dim)."""

    gamma: Tensor
    sink: Tensor | None

    def __init__(self, variant: Variant, heads: int, length: int, dim: int) -> None:
        super().__init__()
        self.variant, self.length = variant, length
        gamma = headwise_gamma(heads) if variant.gamma == "headwise" else torch.tensor(float(variant.gamma))
        self.register_buffer("gamma", gamma, persistent=False)
        self.register_buffer("sink", None if variant.sink is None else torch.tensor(variant.sink), persistent=False)
        self.sinks = nn.Parameter(torch.zeros(heads)) if variant.learned_sink else None
        self.sink_values = nn.Parameter(torch.zeros(heads, dim)) if variant.learned_value else None
        self.progress = 1.0  # part of the training that is done

    def forward(self, positions: Tensor, score_mod: ScoreMod | None = None) -> StableMask:
        """positions: (S,) or (B, S), of each query in its own document."""
        sink = self.sink if self.sinks is None else self.sinks
        if self.variant.constant is not None:
            sink = log_mass(0.0, positions, self.length) + self.variant.constant
        if self.variant.faded and self.progress < 0.5:
            sink = log_mass(self.gamma, positions, self.length) - FADE * (1 - 2 * self.progress)
            return stablemask(math.inf, length=self.length, positions=positions, score_mod=score_mod, sink=sink)
        options: Any = {"positions": positions, "score_mod": score_mod, "sink": sink, "sink_value": self.sink_values}
        return stablemask(self.gamma, length=self.length, **options)

    def share_at_scores_0(self, positions: Tensor) -> Tensor:
        """(p + 1) / (p + 1 + M(p)), (H | 1, S) or (B, H | 1, S): what of a row is real if all scores are 0."""
        seen = (positions + 1).log()
        rows = positions.shape[-1]
        log_m = self(positions).mass(positions.device, rows, rows, torch.float32).table(rows, torch.float32)
        return torch.sigmoid((seen.unsqueeze(1) if positions.dim() == 2 else seen) - log_m)
