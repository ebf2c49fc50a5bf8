"""What is fine-tuned: each variant's mass, and what its rows see in training.

The same rows in the same order for all. Levels and values are those of the untrained model (sinks.py) and stay as they are;
only learned gammas are trained.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.cure.model import Mass, set_mass
from benchmarks.cure.sinks import Sinks
from benchmarks.cure.views import View
from sm_flex_transformers import GammaSchedule

EVICTED = 8  # rows that still see the first token where it is evicted
FALL = 12.0  # nats by which an annealed mass falls


@dataclass(frozen=True)
class Variant:
    name: str
    label: str
    gamma: str | None = None  # "headwise", "schedule", "shares", "learned"
    sink: bool = False
    value: bool = False
    evict: int | None = None
    anneal: bool = False
    penalty: float = 0.0  # on hidden states of a norm far above the median's
    kind: str = "main"

    @property
    def view(self) -> View:
        return View(evict=self.evict)


ALL = (
    Variant("causal", "causal"),
    Variant("evicted-mass", "evicted, mass", sink=True, evict=EVICTED),
    Variant("headwise", "head-wise", gamma="headwise"),
    Variant("mass", "mass, first token in view", sink=True),
    Variant("evicted", "evicted, no mass", evict=EVICTED),
    Variant("evicted-headwise", "evicted, head-wise", gamma="headwise", evict=EVICTED),
    Variant("evicted-value", "evicted, mass with value", sink=True, value=True, evict=EVICTED),
    Variant("schedule", "head-wise by schedule", gamma="schedule"),
    Variant("shares", "gammas of the sinks' shares", gamma="shares"),
    Variant("learned", "learned gammas", gamma="learned"),
    Variant("annealed", "evicted, mass annealed to head-wise", gamma="headwise", sink=True, evict=EVICTED, anneal=True),
    # What removes the first token's own massive activation?
    Variant("alone-mass", "first token seen by itself alone, mass", sink=True, evict=1, kind="slot0"),
    Variant("alone-value", "first token seen by itself alone, mass with value", sink=True, value=True, evict=1, kind="slot0"),
    Variant("penalty-evicted-mass", "evicted, mass, penalty on norms", sink=True, evict=EVICTED, penalty=0.05, kind="slot0"),
    Variant("penalty-mass-value", "in view, mass with value, penalty", sink=True, value=True, penalty=0.05, kind="slot0"),
    Variant("penalty-causal", "causal, penalty on norms", penalty=0.05, kind="slot0"),
)
BY_NAME = {variant.name: variant for variant in ALL}
LONG = ("causal", "evicted-mass", "mass", "headwise")


def mass_at(variant: Variant, sinks: Sinks, done: float) -> Mass:
    """The mass when a share of the training is done; all of it is done when it is measured."""
    gamma: Any = {None: math.inf, "shares": sinks.gamma_LH}.get(variant.gamma, variant.gamma)
    sink = sinks.level_LH if variant.sink else None
    if variant.anneal:
        assert sink is not None
        fallen = min(1.0, 2 * done)
        sink = sink - FALL * fallen if fallen < 1 else None
    return Mass(gamma, sink, sinks.value_LKD if variant.value else None)


def apply(model: Any, variant: Variant, sinks: Sinks, length: int, step: int, steps: int) -> None:
    """Tells the model's config what the variant's mass is after so many of its steps."""
    if variant.gamma == "learned":
        gamma = model.log_gamma_LH.detach().exp() if hasattr(model, "log_gamma_LH") else "headwise"
        set_mass(model, Mass(gamma), length)
        return
    if variant.gamma != "schedule":
        set_mass(model, mass_at(variant, sinks, step / steps), length)
        return
    set_mass(model, Mass("headwise"), length)
    state: Any = SimpleNamespace(global_step=step, max_steps=steps)
    schedule = GammaSchedule(steps=max(1, steps // 2))
    schedule.on_train_begin(None, state, None, model=model)


def new_log_gammas(model: Any) -> torch.Tensor:
    """(L, H): each head's own, from the head-wise ones on."""
    from sm_flex import headwise_gamma

    return headwise_gamma(model.config.num_attention_heads).log().repeat(model.config.num_hidden_layers, 1)
