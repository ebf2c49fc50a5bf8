"""A pretrained model's sinks: the level and the value of each head, and gammas that would give the same share.

The level is the log mass whose mean share is what the first token gets, which it replaces. The mean is over rows N/4 .. N-1: those
before have too few keys to be like the others.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cure.model import attentions, watching
from sm_flex import log_mass

HALVINGS = 40


class Sinks(NamedTuple):
    level_LH: Tensor
    value_LKD: Tensor
    share_LH: Tensor  # of the first token
    gamma_LH: Tensor  # with the same mean share


@torch.no_grad()
def measure(model: Any, rows_RS: Tensor) -> Sinks:
    """Of a causal model, on a few rows of text."""
    layers, length = len(attentions(model)), rows_RS.shape[1]
    first = length // 4
    rest: list[list[Tensor]] = [[] for _ in range(layers)]  # log-sum-exp of all keys but the first
    share: list[list[Tensor]] = [[] for _ in range(layers)]
    value: list[list[Tensor]] = [[] for _ in range(layers)]

    def look(module: Any, query: Tensor, key: Tensor, values: Tensor, mask: Tensor | None) -> None:
        key = key.repeat_interleave(module.num_key_value_groups, 1)
        scores = (query @ key.transpose(-1, -2) * module.scaling).float()
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1), -torch.inf)
        others = scores[0, :, first:, 1:].logsumexp(-1)
        rest[module.layer_idx].append(others)
        share[module.layer_idx].append(torch.sigmoid(scores[0, :, first:, 0] - others))
        value[module.layer_idx].append(values[0, :, 0].float())

    with watching(look):
        for row in rows_RS:
            model.model(row[None], use_cache=False)
    rest_LRHS = torch.stack([torch.stack(x) for x in rest])
    share_LH = torch.stack([torch.stack(x) for x in share]).mean((1, 3))
    level_LH = level_of(rest_LRHS, share_LH)
    positions = torch.arange(first, length, device=rows_RS.device)
    return Sinks(
        level_LH, torch.stack([torch.stack(x).mean(0) for x in value]), share_LH,
        gamma_of(rest_LRHS, share_LH, positions, length),
    )  # fmt: skip


def level_of(rest_LRHS: Tensor, share_LH: Tensor) -> Tensor:
    """(L, H): the constant log mass whose mean share is share_LH beside keys of that log-sum-exp."""

    def share_at(level_LH: Tensor) -> Tensor:
        return torch.sigmoid(level_LH[:, None, :, None] - rest_LRHS).mean((1, 3))

    return _bisected(share_at, share_LH, -40.0, 40.0)


def gamma_of(rest_LRHS: Tensor, share_LH: Tensor, positions: Tensor, length: int) -> Tensor:
    """(L, H): the gamma whose mass has that mean share, as near as gammas from 0 up come to it."""

    def share_at(minus_gamma_LH: Tensor) -> Tensor:
        mass_LHS = log_mass((-minus_gamma_LH).flatten(), positions, length).unflatten(0, share_LH.shape)
        return torch.sigmoid(mass_LHS[:, None] - rest_LRHS).mean((1, 3))

    return -_bisected(share_at, share_LH, -10.0, 0.0)


def _bisected(rising: Any, target: Tensor, low: float, high: float) -> Tensor:
    lower, upper = torch.full_like(target, low), torch.full_like(target, high)
    for _ in range(HALVINGS):
        middle = (lower + upper) / 2
        below = rising(middle) < target
        lower, upper = torch.where(below, middle, lower), torch.where(below, upper, middle)
    return (lower + upper) / 2
