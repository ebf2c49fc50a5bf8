"""torchtitan's attentions that can be served, each made to tell its inner attention the positions, and its sinks if it has any.

They know where in its document each token is and tell only their rotary embedding. Here they hand the positions on with the
mask, which travels through the sharding, checkpointing and compiling around the inner attention as it always does.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torchtitan.models.common.attention import VarlenMetadata

from sm_flex_torchtitan.gamma import local

# Whose attention it is, by the full name of its class: importing some of them needs a GPU's kernels.
SERVED = {
    "torchtitan.models.common.attention.GQAttention": "llama3 and qwen3",
    "torchtitan.models.deepseek_v3.model.Attention": "deepseek_v3 and kimi_k2_7",
    "torchtitan.models.gpt_oss.model.Attention": "gpt_oss",
    "torchtitan.models.muse_glimmer.model.Attention": "muse_glimmer",
    "torchtitan.models.qwen3_5.model.Qwen35Attention": "qwen3_5",
}
# The encoder of images beside a language model. It is not causal, and stays as it is.
VISION = "torchtitan.models.common.vision_encoder.VisionAttention"


class PlacedMask(NamedTuple):
    """Who sees whom, the position of each token in its document (B, L), and the sink of each head of this rank."""

    mask: BlockMask | VarlenMetadata
    positions: Tensor | None
    sinks: Tensor | None = None


def full_name(config: type) -> str:
    """The module and name of the class that a Config belongs to."""
    return f"{config.__module__}.{config.__qualname__.removesuffix('.Config')}"


@functools.cache
def positioned(attention: Any) -> Any:
    """The attention class, whose inner attention is given a PlacedMask in the place of its mask."""

    class Positioned(attention):
        @dataclass(kw_only=True, slots=True)
        class Config(attention.Config):
            pass

        # The sharding finds the inputs by the names that the wrapped forward gives them.
        @functools.wraps(attention.forward)
        def forward(self, x: Tensor, attention_masks: Any, positions: Tensor | None = None) -> Tensor:
            sinks = getattr(self, "sinks", None)
            sinks = None if sinks is None else local(sinks)
            if isinstance(attention_masks, dict):  # for each window one, of which the attention takes its own
                placed: Any = {key: PlacedMask(mask, positions, sinks) for key, mask in attention_masks.items()}
            else:
                placed = PlacedMask(attention_masks, positions, sinks)
            return attention.forward(self, x, placed, positions)

    name = f"Positioned{attention.__name__}"
    Positioned.__name__ = Positioned.__qualname__ = name
    Positioned.Config.__qualname__ = f"{name}.Config"
    return Positioned
