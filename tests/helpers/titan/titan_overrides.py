"""What the override makes of flex_flash, and says of what it cannot serve. A program of titan_driver.py."""

from dataclasses import replace
from typing import Any

import titan_configs
import torch
import torchtitan.models.deepseek_v3.config_registry as deepseek_registry
from torch.nn.attention.flex_attention import create_block_mask
from torchtitan.config.override import apply_overrides
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention

from sm_flex_torchtitan.models import PlacedMask
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
    said += _refused_in_a_forward(attention)
    mtp: Any = deepseek_registry.deepseek_v3_debugmodel_mtp()
    mtp.model_spec.model.update_from_config(config=mtp)
    mtp.override.imports = ["sm_flex_torchtitan.overrides.stablemask"]
    lines = apply_overrides(mtp.override, mtp)
    flash = FlexAttention.Config(block_size=(256, 128), kernel_options={"BACKEND": "FLASH"})
    inner: Any = stablemask(replace(attention, inner_attention=flash)).inner_attention
    flash_is = [type(inner).__qualname__, inner.block_size, inner.kernel_options]
    return {"said": said, "flash": flash_is, "mtp": [line.split(": ")[1].split()[0] for line in lines]}


def _refused_in_a_forward(attention: Any) -> list[str]:
    inner = stablemask(attention, length=131072).inner_attention.build()
    q_BLNH = torch.zeros(1, 8, 16, 16)
    mask: Any = create_block_mask(lambda b, h, i, j: j <= i, 1, None, 8, 8, device="cpu")
    positions_BL = torch.arange(8).expand(1, 8)
    cases: list[tuple[Any, Any]] = [
        (PlacedMask(mask, positions_BL.unsqueeze(-1).expand(1, 8, 3)), None),
        (PlacedMask(mask, positions_BL), lambda out, lse: out),
    ]
    said = []
    for placed, out_transform in cases:
        try:
            inner(q_BLNH, q_BLNH, q_BLNH, attention_masks=placed, out_transform=out_transform)
        except TypeError as error:
            said.append(f"TypeError: {error}")
    return said
