"""What a law is: a function law(fn, problem) with the problems that it is stated for, and the list of all of them.

laws.py states them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from sm_flex.testing.contract import Attention, attend, reference
from sm_flex.testing.problem import FEATURES, Problem
from sm_flex.testing.tolerance import assert_within

Check = Callable[[Attention, Problem], None]
# What any law takes that draws positions and masks of its own; the laws about the mass of gamma alone take no sink.
NO_SINK = ("grouped", "scale")
NO_VALUE = (*NO_SINK, "sink")
BASIC = (*NO_VALUE, "sink_value")
WITHOUT_VALUE = tuple(feature for feature in FEATURES if feature != "sink_value")


class Law(NamedTuple):
    """takes, needs: the FEATURES of a problem that the law is stated for, and those that it is about."""

    check: Check
    takes: tuple[str, ...]
    needs: tuple[str, ...]
    gradient: bool
    finite_gamma: bool


LAWS: dict[str, Law] = {}


def law(
    takes: tuple[str, ...] = FEATURES, needs: tuple[str, ...] = (), gradient: bool = False, finite_gamma: bool = False
) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        LAWS[function.__name__] = Law(function, takes, needs, gradient, finite_gamma)
        return function

    return register


def assert_right(fn: Attention, problem: Problem) -> None:
    expected = reference(problem.arguments)
    assert_within(attend(fn, problem).out, expected.out, expected.out_budget, "out")


def assert_one_more_key(fn: Attention, problem: Problem) -> None:
    problem = problem.replace(gamma=math.inf)
    output, arguments = attend(fn, problem), problem.arguments
    groups, pad = problem.heads // problem.kv_heads, torch.nn.functional.pad
    q, k, v = (arguments[name].double() for name in "qkv")
    k, v = (pad(x.repeat_interleave(groups, dim=1), (0, 0, 0, 1)) for x in (k, v))
    if "sink_value" in arguments:
        v[:, :, -1] = arguments["sink_value"].double().repeat_interleave(problem.heads // problem.sink_values, dim=0)
    seen = problem.slots.unsqueeze(1) >= torch.arange(problem.num_keys, device=problem.device)
    seen = seen.expand(problem.batch, problem.heads, -1, -1) if problem.visible is None else problem.visible
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if problem.scale is None else problem.scale)
    scores[..., :-1] = scores[..., :-1].masked_fill(~seen, -math.inf)
    scores[..., -1] = arguments["sink"].double().unsqueeze(-1)
    assert_within(output.out, torch.softmax(scores, -1).nan_to_num() @ v, output.out_budget + 1e-10, "out")
    if output.lse is not None:
        assert_within(output.lse, torch.logsumexp(scores, -1), output.lse_budget, "lse")
