"""What benchmarks.lm compares: plain causal attention, StableMask, the paper's Table 3, and gpt-oss's sinks.

All are one call of sm_flex with another log M, but the learned artificial token, which is plain causal attention over a text that
has a token more at the start of each piece (lm_text.pack puts it there).
"""

import math
from dataclasses import dataclass

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
    sink: float | None = None  # one more pseudo score a row
    learned_sink: bool = False  # one a head, which starts at 0
    token: bool = False  # a learned token before every piece of text
    kept: tuple[int, ...] = (0,)  # first tokens that window attention keeps, when texts get longer


ALL = (
    Variant("causal", "causal", kept=(0, 4)),
    Variant("stablemask", "StableMask, head-wise", gamma="headwise"),
    Variant("stablemask-0.5", "StableMask, gamma = 0.5", gamma=0.5),
    Variant("pseudo-0", "pseudo value 0", gamma=0.0),
    Variant("pseudo-0.01", "pseudo value 0.01", constant=0.01),
    Variant("token-fixed", "fixed artificial token", sink=0.0),
    Variant("token-learned", "learned artificial token", token=True, kept=(1,)),
    Variant("sink-learned", "learned sink per head", learned_sink=True),
)
BY_NAME = {variant.name: variant for variant in ALL}


def named(name: str) -> Variant:
    """One of ALL, or stablemask-X for any gamma X."""
    if name in BY_NAME:
        return BY_NAME[name]
    try:
        gamma = float(name.removeprefix("stablemask-"))
        stablemask(gamma)
    except ValueError:
        raise ValueError(f"--variants: no such variant: {name}; there are {', '.join(BY_NAME)}, stablemask-GAMMA, all") from None
    if not name.startswith("stablemask-"):
        raise ValueError(f"--variants: no such variant: {name}; did you mean stablemask-{name}?")
    return Variant(name, f"StableMask, gamma = {gamma:g}", gamma=gamma)


class Mass(nn.Module):
    """The variant's StableMask for tokens at given positions. Each layer has its own, and so its own learned sinks."""

    gamma: Tensor

    def __init__(self, variant: Variant, heads: int, length: int) -> None:
        super().__init__()
        self.variant, self.length = variant, length
        gamma = headwise_gamma(heads) if variant.gamma == "headwise" else torch.tensor(float(variant.gamma))
        self.register_buffer("gamma", gamma, persistent=False)
        self.sinks = nn.Parameter(torch.zeros(heads)) if variant.learned_sink else None

    def forward(self, positions: Tensor, score_mod: ScoreMod | None = None) -> StableMask:
        """positions: (S,), of each query in its own piece of text."""
        sink = self.sinks if self.sinks is not None else self.variant.sink
        if self.variant.constant is not None:
            sink = log_mass(0.0, positions, self.length) + self.variant.constant
        return stablemask(self.gamma, length=self.length, positions=positions, score_mod=score_mod, sink=sink)
