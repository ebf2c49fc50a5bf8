"""An override for torchtitan that puts the oracle of eq. 11 in the place of the inner attention. For titan_driver.py."""

from dataclasses import dataclass, replace
from typing import Any

import spmd_types as spmd
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torchtitan.config.override import derive, override
from torchtitan.models.common.attention import BaseAttention, FlexAttention
from torchtitan.models.common.decoder_sharding import dense_param_placement

from sm_flex import headwise_gamma
from sm_flex.testing import oracle
from sm_flex_torchtitan.models import PlacedMask, positioned
from sm_flex_torchtitan.overrides import AnyAttention


class OracleAttention(FlexAttention):
    """Eq. 11 with the model's sinks, of the layer's window. A learned gamma is softplus(log(e^gamma - 1) + gamma_shift)."""

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        gamma: Any
        length: int
        heads: int
        window: int | None
        learned: bool

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.gamma_shift = nn.Parameter(torch.zeros(config.heads)) if config.learned else None

    def reset_parameters(self) -> None:
        if self.gamma_shift is not None:
            nn.init.zeros_(self.gamma_shift)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, *, attention_masks: PlacedMask, scale: Any, **_: Any
    ) -> Tensor:
        positions_BL, sinks_N = attention_masks.positions, attention_masks.sinks
        assert positions_BL is not None
        document_BL = (positions_BL == 0).cumsum(1)
        assert document_BL[:, -1].min() > 1, "rows of several documents"
        visible = document_BL[:, :, None] == document_BL[:, None]
        if self.config.window is not None:
            row = torch.arange(q_BLNH.shape[1])
            visible = visible & (row[:, None] - row < self.config.window)
        gamma = headwise_gamma(self.config.heads) if self.config.gamma == "headwise" else self.config.gamma
        if self.gamma_shift is not None:
            gamma = softplus(torch.log(torch.expm1(torch.as_tensor(gamma).double())) + self.gamma_shift.double())
        out_BNLH = oracle(
            *[x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH)], gamma=gamma, length=self.config.length,
            positions=positions_BL, visible=visible[:, None], scale=scale, sink=sinks_N,
        )[0]  # fmt: skip
        return out_BNLH.transpose(1, 2).to(q_BLNH.dtype)


@override(target=AnyAttention)
def oracle_attention(attention: Any, *, gamma: Any, length: int = 256, learned: bool = False) -> BaseAttention.Config:
    inner: Any = derive(
        attention.inner_attention, OracleAttention.Config, gamma=gamma, length=length, heads=attention.n_heads,
        window=getattr(attention, "sliding_window_size", None), learned=learned,
    )  # fmt: skip
    if inner.sharding_config is not None:
        states = {"gamma_shift": dense_param_placement(tp=spmd.S(0))}
        inner.sharding_config = replace(inner.sharding_config, state_shardings=states)
    return derive(attention, positioned(type(attention)._owner).Config, inner_attention=inner)
