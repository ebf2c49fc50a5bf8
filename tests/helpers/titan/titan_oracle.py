"""An override for torchtitan that puts the oracle of eq. 11 in the place of the inner attention. For titan_driver.py."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchtitan.config.override import derive, override
from torchtitan.models.common.attention import FlexAttention, GQAttention

from sm_flex import headwise_gamma
from sm_flex.testing import oracle
from sm_flex_torchtitan.attention import PlacedMask, PositionedGQAttention


class OracleAttention(FlexAttention):
    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        gamma: Any
        length: int

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.gamma, self.length = config.gamma, config.length

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, *, attention_masks: PlacedMask, scale: Any, enable_gqa: bool
    ) -> Tensor:
        positions_BL = attention_masks.positions
        assert positions_BL is not None
        document_BL = (positions_BL == 0).cumsum(1)
        assert document_BL[:, -1].min() > 1, "rows of several documents"
        gamma = headwise_gamma(q_BLNH.shape[2]) if self.gamma == "headwise" else self.gamma
        out_BNLH, _ = oracle(
            *[x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH)], gamma=gamma, length=self.length, positions=positions_BL,
            visible=(document_BL[:, :, None] == document_BL[:, None])[:, None], scale=scale,
        )  # fmt: skip
        return out_BNLH.transpose(1, 2).to(q_BLNH.dtype)


@override(target=GQAttention.Config)
def oracle_attention(attention: Any, *, gamma: Any, length: int = 256) -> PositionedGQAttention.Config:
    inner = derive(attention.inner_attention, OracleAttention.Config, gamma=gamma, length=length)
    return derive(attention, PositionedGQAttention.Config, inner_attention=inner)
