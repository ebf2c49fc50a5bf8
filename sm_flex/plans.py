"""What follows from the kind of a call alone, kept for the next call of that kind.

A kind is what the checks and the choice of the engine look at: shapes, dtypes and options. A decode step's
attention takes less time than they do, and layers make calls of one kind again and again. So once a call has
been checked and served by one kernel of a CPU without a bias, the next of its kind goes straight there. What
depends on values is looked at each time: positions where log M is found (mass/cache.py).
"""

from typing import Any, NamedTuple, TypeAlias

import torch

from sm_flex import runtime
from sm_flex.runtime import PLAIN_TENSORS, flash_sdp_enabled, plain_eager, transforms_active
from sm_flex.score_mod import StableMask

Kind: TypeAlias = tuple[Any, ...]

PLAIN_SCALES = (float, type(None))
MAX_PLANS = 1024


class Plan(NamedTuple):
    """causal: the kernel's own flag. dtype: of scores, lse and log M. num_keys: of the call that it was made for.

    A single query may have more keys or fewer: as it needs positions, its N is known without them.
    """

    causal: bool
    scale: float
    dtype: torch.dtype
    heads: int
    num_queries: int
    num_keys: int


_PLANS: dict[Kind, Plan] = {}


def kind_of(query: Any, key: Any, value: Any, mask: StableMask, scale: Any, *options: Any) -> Kind | None:
    """None for a call that is not of the simple sort that plans are kept for.

    options: what else the entry point's checks depend on, beginning with its name.
    """
    if (
        plain_eager()
        and mask.kind is not None
        and not transforms_active()
        and not torch.is_autocast_enabled("cpu")
        and flash_sdp_enabled()
        and runtime.KERNEL_DEVICE != "cpu"
        and type(query) in PLAIN_TENSORS
        and type(key) in PLAIN_TENSORS
        and type(value) in PLAIN_TENSORS
        and type(scale) in PLAIN_SCALES
        and query.is_cpu
        and key.is_cpu
        and value.is_cpu
    ):
        of_keys: Any = key.shape, value.shape
        if len(query.shape) == len(key.shape) == len(value.shape) == 4 and query.shape[2] == 1 < key.shape[2] == value.shape[2]:
            # Each token of a text has one key more, and nothing that is checked depends on how many there are.
            of_keys = key.shape[:2], key.shape[3], value.shape[:2], value.shape[3]
        return options, mask.kind, scale, query.shape, of_keys, query.dtype, key.dtype, value.dtype
    return None


def find(kind: Kind | None) -> Plan | None:
    return None if kind is None else _PLANS.get(kind)


def keep(kind: Kind, plan: Plan) -> None:
    if len(_PLANS) >= MAX_PLANS:
        _PLANS.clear()
    _PLANS[kind] = plan
