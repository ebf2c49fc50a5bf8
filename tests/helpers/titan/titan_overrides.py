"""What the override makes of flex_flash, and says of what it cannot serve. A program of titan_driver.py."""

from dataclasses import replace
from typing import Any

import titan_configs
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention

from sm_flex_torchtitan.overrides import stablemask

KWARGS: list[dict[str, Any]] = [
    {"gamma": "half"},
    {"gamma": True},
    {"gamma": [0.5, None]},
    {"gamma": -1},
    {"gamma": float("nan")},
    {"length": 2.5},
    {"length": 0},
]


def main() -> dict[str, Any]:
    attention = titan_configs.llama3().model_spec.model.layers[0].attention
    cases = [(attention, kwargs) for kwargs in KWARGS]
    cases.append((replace(attention, inner_attention=ScaledDotProductAttention.Config()), {}))
    cases.append((attention, {"learned": 1}))
    cases.append((replace(attention, n_heads=2), {"learned": True, "gamma": [0.5, 0]}))
    said = []
    for given, kwargs in cases:
        try:
            stablemask(given, **kwargs)
        except (TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("nothing")
    flash = FlexAttention.Config(block_size=(256, 128), kernel_options={"BACKEND": "FLASH"})
    inner: Any = stablemask(replace(attention, inner_attention=flash)).inner_attention
    return {"said": said, "flash": [type(inner).__qualname__, inner.block_size, inner.kernel_options]}
