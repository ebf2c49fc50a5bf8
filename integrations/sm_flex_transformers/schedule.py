"""Fine-tuning a causal model into StableMask: bring the mass in gradually."""

import math
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from sm_flex import headwise_gamma
from sm_flex.mass.share import gamma_of_share, mean_pseudo_share
from sm_flex_transformers import settings
from sm_flex_transformers.interface import NAMES

logger = logging.get_logger("transformers.sm_flex")


class GammaSchedule(TrainerCallback):
    """Trainer callback: the mass grows evenly from nothing to that of the target over the first ``steps`` steps, then stays.

    What grows linearly is the mean share of a causal row that the pseudo scores take where all real scores are 0
    (:func:`sm_flex.mass.share.mean_pseudo_share`), for each head; gamma is the one that has it. (Linear in log gamma, from a gamma
    that is all but causal, most steps change nothing, and then the mass arrives at once.) The current value stands in
    model.config.stablemask["gamma"], so that a checkpoint resumes where it was, and the last value is saved as the list that it is.

    Args:
        steps: of the optimizer, at least 1.
        target: "headwise", a number, or one number a head; all > 0.
        start: the gamma whose share is the first, > 0; inf is none.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; and, when training begins, a model that runs neither
            stablemask nor sm_flex, whose config asks for a gamma that is not the target, or whose layers have different
            numbers of heads where the target is not one number.
    """

    def __init__(self, steps: int, target: str | float | list[float] = "headwise", start: float = math.inf) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"steps must be an int, got {steps!r}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        numbers = [] if target == "headwise" else target if isinstance(target, list) else [target]
        if not all(isinstance(x, (int, float)) and 0 < x < math.inf for x in numbers) or not 0 < start:
            raise ValueError(
                f'start and target must be positive numbers (target may be "headwise", start inf), got {start} and {target!r}'
            )
        self.steps, self.target, self.start = steps, target, start

    def gamma(self, step: int, num_heads: int, length: int = 2048) -> list[float]:
        """One gamma a head after ``step`` steps, for the training length N."""
        if self.target == "headwise":
            targets = headwise_gamma(num_heads).tolist()
        else:
            targets = self.target if isinstance(self.target, list) else [float(self.target)] * num_heads
        done = min(1.0, step / self.steps)
        if done == 1.0:
            return targets
        start, target = torch.tensor(self.start, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64)
        first, last = mean_pseudo_share(start, length), mean_pseudo_share(target, length)
        return gamma_of_share((1 - done) * first + done * last, length).tolist()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        settings.hand_down(model.config)
        config = model.config.get_text_config()
        if config._attn_implementation not in NAMES:
            raise ValueError(
                f'GammaSchedule needs a model with attn_implementation="stablemask" or "sm_flex", '
                f'got {config._attn_implementation!r}: load it so, or model.set_attn_implementation("stablemask")'
            )
        given = (settings.of(config) or {}).get("gamma", self.target)
        # A resumed run finds the value that the schedule left.
        if given not in (self.target, self.start, self._now(state, config)):
            raise ValueError(
                f'config.stablemask["gamma"] is {given!r} and the target of GammaSchedule {self.target!r}: '
                f"pass target={given!r}, or, where an earlier schedule was cut short, resume from its checkpoint"
            )
        last = getattr(state, "max_steps", 0) or self.steps
        if last < self.steps:
            logger.warning(f"GammaSchedule takes {self.steps} steps, the training {last}: it ends before gamma is at its target")
        self._set(state, config)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._set(state, model.config.get_text_config())

    def _set(self, state: Any, config: Any) -> None:
        config.stablemask = {**(settings.of(config) or {}), "gamma": self._now(state, config)}

    def _now(self, state: Any, config: Any) -> float | list[float]:
        """One gamma per head, or one for all where the layers differ in their heads."""
        heads = settings.heads_of_layers(config)
        length = settings.length(config)
        if len(heads) == 1:
            return self.gamma(state.global_step, heads[0], length)
        if not isinstance(self.target, (int, float)):
            raise ValueError(
                f"this model's layers have {' or '.join(map(str, heads))} query heads, and GammaSchedule sets one gamma per head "
                "for all of them: give it one number as its target"
            )
        return self.gamma(state.global_step, 1, length)[0]
