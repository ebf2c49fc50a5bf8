"""Sliding windows: which layers need no mask for theirs, and what a mask says where one is needed.

Transformers' window W counts the query's own key. Dimension letters: B sequences, S queries, T keys.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sm_flex_transformers.interface import passes_its_window


def layers_apply_it(asked: dict[str, Any]) -> bool:
    """Whether a mask is a plain sliding window that ends with the last key, so that its layers need none.

    asked: what a mask function is called with.
    """
    config, window = asked["config"], asked.get("local_size")
    if window is None or not asked.get("allow_is_causal_skip", True) or torch.compiler.is_exporting():
        return False
    if window != getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) is not None:
        return False
    first, num_queries, num_keys = asked.get("q_offset", 0), asked["q_length"], asked["kv_length"]
    if isinstance(first, Tensor) or not passes_its_window(config.model_type):
        return False
    # The keys end with the queries; those of a static cache that is still empty begin with them.
    if num_queries > 1 and num_queries != num_keys:
        return False
    return first + num_queries == asked.get("kv_offset", 0) + num_keys


def width(window: Any, attention_mask: Tensor | None, num_keys: int) -> int | None:
    """A layer's window, where no mask holds it and it leaves a key out."""
    return window if attention_mask is None and isinstance(window, int) and 0 < window < num_keys else None


def window_size(window: int | None) -> tuple[int, int]:
    """The same in flash-attention's terms: how many keys before and after its own a query sees, -1 for all."""
    return -1 if window is None else window - 1, 0


def narrowed(visible: Tensor | None, window: int | None, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """visible within the causal slots, and the window: bool (B|1, 1, S, T)."""
    seen = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    if window is not None:
        seen = seen.triu(num_keys - num_queries - window + 1)
    return seen if visible is None else visible & seen


def behind_all(key: Tensor, value: Tensor, allowed: Tensor | None, num_queries: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same attention where every key stands in the causal slots of every query, so that allowed alone says who sees whom.

    S - 1 more keys, which nobody sees, move the end of the keys so far that the first query reaches the last real one.
    """
    more = num_queries - 1
    key, value = [F.pad(x, (0, 0, 0, more)) for x in (key, value)]
    if allowed is not None:
        allowed = F.pad(allowed, (0, more), value=False if allowed.dtype == torch.bool else -torch.inf)
    return key, value, allowed
