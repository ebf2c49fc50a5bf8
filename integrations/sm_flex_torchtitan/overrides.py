"""What torchtitan's --override.imports may name: stablemask, and attention_backend for one of torchtitan's own.

Overrides are applied to the config before anything is built from it, after torchtitan has put training.seq_len and the
sharding into it.
"""

import math
from abc import ABCMeta
from dataclasses import replace
from typing import Any

import spmd_types as spmd

from sm_flex import gamma_from, length_from
from sm_flex_torchtitan import BACKENDS
from sm_flex_torchtitan.versions import check_versions

check_versions()  # before torchtitan's modules, which an unknown version may lack

from torchtitan.config import Configurable  # noqa: E402
from torchtitan.config.override import derive, override  # noqa: E402
from torchtitan.models.common.attention import BaseAttention, FlexAttention, VarlenAttention  # noqa: E402
from torchtitan.models.common.config_utils import get_attention_config  # noqa: E402
from torchtitan.models.common.decoder_sharding import dense_param_placement  # noqa: E402

from sm_flex_torchtitan.attention import StableFlexAttention, StableVarlenAttention  # noqa: E402
from sm_flex_torchtitan.models import SERVED, VISION, full_name, positioned  # noqa: E402

_STABLE = {FlexAttention.Config: StableFlexAttention.Config, VarlenAttention.Config: StableVarlenAttention.Config}


class AnyAttention(Configurable.Config, metaclass=ABCMeta):
    """Every config that has an inner attention, so that a model which cannot be served is refused and not passed over."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return "inner_attention" in getattr(other, "__dataclass_fields__", ()) and full_name(other) != VISION


@override(target=AnyAttention, description="StableMask")
def stablemask(attention: Any, *, gamma: Any = "headwise", length: Any = None, learned: bool = False) -> BaseAttention.Config:
    """An attention with StableMask in the place of a model's inner attention, on the same backend.

    A model's own sinks join the mass of gamma, and with gamma = inf they are all of it.

    Args:
        attention: what the model has; one of models.SERVED on flex, flex_flash or varlen is served.
        gamma: "headwise", a number >= 0, or a list of them, one for each query head of the model.
        length: N, the training length; training.seq_len where None. At least that.
        learned: gamma is a parameter of each layer, which starts there.

    Raises:
        TypeError, ValueError: naming the argument, the rule, what came and the way out.
    """
    _check_served(attention)
    inner = attention.inner_attention
    if type(inner) not in _STABLE:
        raise ValueError(f"inner_attention must be one of torchtitan's {', '.join(BACKENDS)}, got {type(inner).__qualname__}")
    # One for each head, so that a tensor-parallel rank can take those of its own.
    gammas = tuple(gamma_from(gamma, attention.n_heads).expand(attention.n_heads).tolist())
    if not isinstance(learned, bool):
        raise TypeError(f"learned must be true or false, got {learned!r}")
    if learned and not all(0 < x < math.inf for x in gammas):
        raise ValueError(f"gamma must be above 0 and finite where it is learned, since it stays positive, got {gamma!r}")
    sharding = inner.sharding_config
    if sharding is not None:
        # Every rank has the gamma of every head, and takes its heads' in the forward. A parameter is sharded as heads are.
        placements = {"gamma": dense_param_placement(tp=spmd.R), "gamma_shift": dense_param_placement(tp=spmd.S(0))}
        states = {**sharding.state_shardings, **placements}
        sharding = replace(sharding, state_shardings=states)
    training = attention.rope.max_seq_len  # where torchtitan has just put training.seq_len
    deltas: dict[str, Any] = {"gamma": gammas, "length": _length(length, training), "learned": learned}
    stable = derive(inner, _STABLE[type(inner)], sharding_config=sharding, **deltas)
    return derive(attention, positioned(type(attention)._owner).Config, inner_attention=stable)


@override(target=AnyAttention, description="one of torchtitan's own attention backends")
def attention_backend(attention: Any, *, name: str) -> BaseAttention.Config:
    """A model's attention on another of torchtitan's backends.

    Raises:
        ValueError: the backend is not known, or this machine has not the GPU for it.
    """
    _check_served(attention)
    inner: Any = replace(get_attention_config(name), sharding_config=attention.inner_attention.sharding_config)
    window = getattr(attention, "sliding_window_size", None)
    if window is not None and isinstance(inner, VarlenAttention.Config):
        # A layer with a window takes it from its mask on flex, and on varlen from the kernel.
        inner = replace(inner, window_size=(window - 1, 0))
    return replace(attention, inner_attention=inner)


def _check_served(attention: Any) -> None:
    name = full_name(type(attention))
    if name not in SERVED:
        raise ValueError(f"the model's attention must be that of {', '.join(SERVED.values())}, got {name}")


def _length(length: Any, training: int) -> int:
    if length is None:
        return training
    if type(length) is int and length < training:
        raise ValueError(f"length must be at least training.seq_len, {training}, got {length}: leave it out for {training}")
    return length_from(length)
