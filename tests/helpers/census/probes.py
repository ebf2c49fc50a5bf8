"""What the census runs models with: float64 throughout, and a recorder of what a model hands its attention."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from tests.helpers.transformers_models import eq_11, full_mask


class Float64(TorchFunctionMode):
    """Casts to float32 become casts to float64: norms, routers, angles and recurrences round like the rest of the model.

    A float32 step inside a float64 model would turn 1e-15 into 1e-7, and hide an error of that size.
    """

    def __enter__(self) -> "Float64":
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self.default)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


class Seen(NamedTuple):
    """One call of an attention function."""

    module: nn.Module
    keywords: dict[str, Any]  # those that are not None
    mask: Tensor | None
    num_queries: int
    num_keys: int


class Record:
    """What one run of a model handed its attention, and asked of the mask function."""

    def clear(self) -> None:
        self.calls: list[Seen] = []
        self.plain: list[Tensor] = []  # masks that say no more than causal
        self.position_ids: Tensor | None = None  # what the model was called with
        self.bidirectional = False  # a mask for attention that is not causal was asked for

    __init__ = clear


RECORD = Record()


def recorder(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """Plain causal attention whatever else is asked: it never raises, so that a refusal can be held against what was asked."""
    keywords = {name: value for name, value in given.items() if value is not None}
    mask = None if any(attention_mask is plain for plain in RECORD.plain) else attention_mask
    RECORD.calls.append(Seen(module, keywords, mask, query.shape[2], key.shape[2]))
    if attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
        attention_mask = None
    out = eq_11(query, key, value, gamma=float("inf"), length=1, mask=attention_mask, scaling=given.get("scaling"))
    return out, None


def recorder_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """A mask even where none is needed, since some models count on one."""
    RECORD.bidirectional |= "allow_is_bidirectional_skip" in kwargs
    mask = full_mask(*args, **kwargs)
    if mask is not None and sdpa_mask(*args, **kwargs) is None:
        RECORD.plain.append(mask)
    return mask


AttentionInterface.register("recorder", recorder)
AttentionMaskInterface.register("recorder", recorder_mask)
