"""What torchtitan's --override.imports may name: stablemask, and attention_backend for one of torchtitan's own.

Overrides are applied to the config before anything is built from it, after torchtitan has put training.seq_len and the
sharding into it.
"""

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
from torchtitan.models.common.attention import FlexAttention, GQAttention, VarlenAttention  # noqa: E402
from torchtitan.models.common.config_utils import get_attention_config  # noqa: E402
from torchtitan.models.common.decoder_sharding import dense_param_placement  # noqa: E402

from sm_flex_torchtitan.attention import PositionedGQAttention, StableFlexAttention, StableVarlenAttention  # noqa: E402

_STABLE = {FlexAttention.Config: StableFlexAttention.Config, VarlenAttention.Config: StableVarlenAttention.Config}


class AnyAttention(Configurable.Config, metaclass=ABCMeta):
    """Every config that has an inner attention, so that a model which cannot be served is refused and not passed over."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return "inner_attention" in getattr(other, "__dataclass_fields__", ())


@override(target=AnyAttention, description="StableMask")
def stablemask(attention: Any, *, gamma: Any = "headwise", length: Any = None) -> PositionedGQAttention.Config:
    """An attention with StableMask in the place of a GQAttention's inner attention, on the same backend.

    Args:
        attention: what the model has; a GQAttention on flex, flex_flash or varlen is served.
        gamma: "headwise", a number >= 0, or a list of them, one for each query head of the model.
        length: N, the training length; training.seq_len where None. At least that.

    Raises:
        TypeError, ValueError: naming the argument, the rule, what came and the way out.
    """
    _check_gqa(attention)
    inner = attention.inner_attention
    if type(inner) not in _STABLE:
        raise ValueError(f"inner_attention must be one of torchtitan's {', '.join(BACKENDS)}, got {type(inner).__qualname__}")
    # One for each head, so that a tensor-parallel rank can take those of its own.
    gammas = tuple(gamma_from(gamma, attention.n_heads).expand(attention.n_heads).tolist())
    sharding = inner.sharding_config
    if sharding is not None:
        # Every rank has the gamma of every head, and takes its heads' in the forward.
        states = {**sharding.state_shardings, "gamma": dense_param_placement(tp=spmd.R)}
        sharding = replace(sharding, state_shardings=states)
    training = attention.rope.max_seq_len  # where torchtitan has just put training.seq_len
    stable = derive(inner, _STABLE[type(inner)], gamma=gammas, length=_length(length, training), sharding_config=sharding)
    return derive(attention, PositionedGQAttention.Config, inner_attention=stable)


@override(target=AnyAttention, description="one of torchtitan's own attention backends")
def attention_backend(attention: Any, *, name: str) -> GQAttention.Config:
    """A GQAttention on another of torchtitan's backends.

    Raises:
        ValueError: the backend is not known, or this machine has not the GPU for it.
    """
    _check_gqa(attention)
    inner = replace(get_attention_config(name), sharding_config=attention.inner_attention.sharding_config)
    return replace(attention, inner_attention=inner)


def _check_gqa(attention: Any) -> None:
    if type(attention) is not GQAttention.Config:
        kind = f"{type(attention).__module__}.{type(attention).__qualname__.removesuffix('.Config')}"
        raise ValueError(f"the model's attention must be torchtitan's GQAttention, as in llama3 and qwen3, got {kind}")


def _length(length: Any, training: int) -> int:
    if length is None:
        return training
    if type(length) is int and length < training:
        raise ValueError(f"length must be at least training.seq_len, {training}, got {length}: leave it out for {training}")
    return length_from(length)
