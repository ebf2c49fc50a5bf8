"""A pretrained model's sinks: the level and the value of each head, and gammas that would give the same share.

The level is that of sm_flex.diagnostics.sink_level over rows N/4 .. N-1: those before have too few keys to be like the others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cure.model import attentions, watching
from sm_flex import log_mass
from sm_flex.diagnostics import first_token_share, sink_level

HALVINGS = 40


class Sinks(NamedTuple):
    level_LH: Tensor  # log mass
    value_LKD: Tensor  # of the first token, mean over texts
    share_LH: Tensor  # of the first token, mean over texts and rows
    gamma_LH: Tensor  # with the same mean share, from 0 up


@torch.no_grad()
def measure(model: Any, rows_RS: Tensor) -> Sinks:
    """Of a causal model, on a few rows of text."""
    length = rows_RS.shape[1]
    first = length // 4
    found: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def look(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        scale = module.scaling
        level_H = sink_level(query, key, rows=(first, length), scale=scale).to(query.dtype)
        share_RHS = first_token_share(query, key, None, scale=scale)[:, :, first:]
        # What is not the first token's, from its share: the log-sum-exp of the others beside its own score.
        groups = module.num_key_value_groups
        score_RHS = (query[:, :, first:] * key[:, :, :1].repeat_interleave(groups, 1)).sum(-1) * scale
        rest_RHS = score_RHS - torch.logit(share_RHS.double()).to(query.dtype)
        found[module.layer_idx] = level_H, value[:, :, 0].mean(0), share_RHS.mean((0, 2)), rest_RHS

    with watching(look):
        model.model(rows_RS, use_cache=False)
    level_LH, value_LKD, share_LH, rest_LRHS = (
        torch.stack(x) for x in zip(*(found[i] for i in range(len(attentions(model)))), strict=True)
    )
    positions = torch.arange(first, length, device=rows_RS.device)
    return Sinks(level_LH, value_LKD, share_LH, gamma_of(rest_LRHS, share_LH, positions, length))


def gamma_of(rest_LRHS: Tensor, share_LH: Tensor, positions: Tensor, length: int) -> Tensor:
    """(L, H): the gamma whose mass has that mean share beside keys of that log-sum-exp; 0 where even 0 has less."""

    def share_at(gamma_LH: Tensor) -> Tensor:
        mass_LHS = log_mass(gamma_LH.flatten(), positions, length).unflatten(0, share_LH.shape)
        return torch.sigmoid(mass_LHS[:, None] - rest_LRHS).mean((1, 3))

    return _where_it_falls_to(share_LH, share_at, 10.0)


def _where_it_falls_to(target: Tensor, falling: Callable[[Tensor], Tensor], most: float) -> Tensor:
    low, high = torch.zeros_like(target), torch.full_like(target, most)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = falling(middle) > target
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2
