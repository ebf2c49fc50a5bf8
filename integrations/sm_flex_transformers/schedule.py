"""Fine-tuning a causal model into StableMask: bring the mass in gradually."""

import math
from typing import Any

from transformers import TrainerCallback

from sm_flex import headwise_gamma


class GammaSchedule(TrainerCallback):
    """Trainer callback: every head's gamma falls from start to its target over the first ``steps`` steps, then stays.

    From log gamma = log start (at start >= 10 even the first rows are all but causal: M(0) < 5e-5) linearly to log target.
    The current value stands in model.config.stablemask["gamma"], so a checkpoint resumes where it was, and the last value is
    saved as the list that it is.

    Args:
        steps: of the optimizer, at least 1.
        target: "headwise", a number, or one number a head; all > 0.
        start: > 0.
    """

    def __init__(self, steps: int, target: str | float | list[float] = "headwise", start: float = 10.0) -> None:
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

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        config = model.config
        gamma = self.gamma(state.global_step, config.num_attention_heads)
        config.stablemask = {**(getattr(config, "stablemask", None) or {}), "gamma": gamma}
