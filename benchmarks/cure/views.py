"""Who sees whom: all keys, a window with or without the first tokens, or all but the first token from some row on."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """Of the keys up to its own, those that a query sees."""

    window: int | None = None  # the most recent ones
    keep: int = 0  # and of the first ones so many
    evict: int | None = None  # the first token is not seen by queries from this row on


WHOLE = View()


@functools.lru_cache(maxsize=32)
def mask_of(view: View, length: int, device: torch.device) -> Tensor | None:
    """(1, 1, S, S) bool for the model's attention_mask, or None for all keys."""
    if view == WHOLE:
        return None
    query, key = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)[None]
    seen = key <= query
    if view.window is not None:
        seen = seen & ((query - key < view.window) | (key < view.keep))
    if view.evict is not None:
        seen = seen & ((key > 0) | (query < view.evict))
    return seen[None, None]
