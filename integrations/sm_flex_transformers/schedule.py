"""Fine-tuning a causal model into StableMask: bring the mass in gradually."""

import math
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from sm_flex import headwise_gamma
from sm_flex_transformers import settings
from sm_flex_transformers.interface import NAMES

logger = logging.get_logger("transformers.sm_flex")


class GammaSchedule(TrainerCallback):
    """Trainer callback: every head's gamma falls from start to its target over the first ``steps`` steps, then stays.

    log gamma falls linearly, from a start at which even the first rows are all but causal (M(0) < 5e-5). The current value
    stands in model.config.stablemask["gamma"], so that a checkpoint resumes where it was, and the last value is saved as the
    list that it is.

    Args:
        steps: of the optimizer, at least 1.
        target: "headwise", a number, or one number a head; all > 0.
        start: > 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; and, when training begins, a model that runs neither
            stablemask nor sm_flex, whose config asks for a gamma that is not the target, or whose layers have different
            numbers of heads where the target is not one number.
    """

    def __init__(self, steps: int, target: str | float | list[float] = "headwise", start: float = 10.0) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"steps must be an int, got {steps!r}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        numbers = [] if target == "headwise" else target if isinstance(target, list) else [target]
        if not all(isinstance(x, (int, float)) and 0 < x < math.inf for x in [start, *numbers]):
            raise ValueError(f'start and target must be positive numbers (target may be "headwise"), got {start} and {target!r}')
        self.steps, self.target, self.start = steps, target, start

    def gamma(self, step: int, num_heads: int) -> list[float]:
        """One gamma a head after ``step`` steps."""
        if self.target == "headwise":
            targets = headwise_gamma(num_heads).tolist()
        else:
            targets = self.target if isinstance(self.target, list) else [float(self.target)] * num_heads
        done = min(1.0, step / self.steps)
        return [math.exp((1 - done) * math.log(self.start) + done * math.log(target)) for target in targets]

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
        if len(heads) == 1:
            return self.gamma(state.global_step, heads[0])
        if not isinstance(self.target, (int, float)):
            raise ValueError(
                f"this model's layers have {' or '.join(map(str, heads))} query heads, and GammaSchedule sets one gamma per head "
                "for all of them: give it one number as its target"
            )
        return self.gamma(state.global_step, 1)[0]
