"""torchtitan's inner attentions with StableMask, for an attention of models.py.

A model's own sinks (gpt_oss) join gamma's mass inside the attention. torchtitan rescales the output by the log-sum-exp instead,
whose gradient its varlen kernel does not take.

Shapes in names, as in torchtitan: B batch, L sequence (of this rank), N heads (of this rank), H head dim, T tokens of the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import spmd_types as spmd
import torch
from spmd_types.runtime import get_partition_spec
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torchtitan.distributed.compile import maybe_regional_inductor
from torchtitan.distributed.utils import get_spmd_backend
from torchtitan.models.common.attention import FlexAttention, VarlenAttention, VarlenMetadata

from sm_flex import flex_attention, stablemask, varlen_attn
from sm_flex_torchtitan.gamma import HasGamma, local
from sm_flex_torchtitan.models import PlacedMask

OutTransform = Callable[[Tensor, Tensor], Tensor]


class StableFlexAttention(HasGamma, FlexAttention):
    """FlexAttention with StableMask. Its BlockMask is torchtitan's: causal, within documents."""

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        gamma: tuple[float, ...]
        length: int
        learned: bool = False

    _options: ClassVar[dict[str, Any]] = {**FlexAttention.inductor_configs}
    # Compiled as FlexAttention compiles torch's: one region, which selective checkpointing saves as one op.
    compiled: ClassVar[Callable[..., Any]] = torch.compile(flex_attention, options=_options)
    eager: ClassVar[Callable[..., Any]] = staticmethod(flex_attention)  # a CPU has no flex kernel to compile

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.set_gamma(config)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: PlacedMask,
        scale: float | None = None,
        enable_gqa: bool = False,
        out_transform: OutTransform | None = None,
    ) -> Tensor:
        block_mask, positions_BL, _ = attention_masks
        if not isinstance(block_mask, BlockMask) or positions_BL is None:
            raise TypeError(f"attention_masks must be a BlockMask, with positions, got {type(block_mask).__name__}")
        if positions_BL.dim() != 2:
            raise TypeError(
                f"positions must be those in the document, (B, L), got {tuple(positions_BL.shape)}: 3-D ones go on varlen"
            )
        sinks_N = _sinks(attention_masks, out_transform)
        attend = StableFlexAttention.compiled if q_BLNH.is_cuda else StableFlexAttention.eager
        # ordered=False: under context parallelism this rank has some queries and all keys, both in the order of a load
        # balancer, and the BlockMask alone knows it.
        with maybe_regional_inductor(FlexAttention.inductor_configs), spmd.no_typecheck():
            mask = stablemask(
                self.gamma_of(q_BLNH), length=self.length, positions=local(positions_BL), sink=sinks_N, ordered=False
            )
            out_BLNH = attend(
                *[x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH)], score_mod=mask,
                block_mask=block_mask, scale=scale, enable_gqa=enable_gqa, kernel_options=self.kernel_options,
            ).transpose(1, 2)  # fmt: skip
        return _typed_as(q_BLNH, out_BLNH)


class StableVarlenAttention(HasGamma, VarlenAttention):
    """VarlenAttention with StableMask, whose positions restart in each document."""

    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):
        gamma: tuple[float, ...]
        length: int
        learned: bool = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.set_gamma(config)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: PlacedMask,
        scale: float | None = None,
        enable_gqa: bool = False,
        out_transform: OutTransform | None = None,
    ) -> Tensor:
        packed = attention_masks.mask
        if not isinstance(packed, VarlenMetadata):
            raise TypeError(f"attention_masks must be VarlenMetadata, got {type(packed).__name__}")
        sinks_N = _sinks(attention_masks, out_transform)
        # The kernels for packed documents know bf16 and fp16 only; torchtitan casts likewise.
        dtype = torch.bfloat16 if q_BLNH.is_cuda else q_BLNH.dtype
        with spmd.no_typecheck():
            mask = stablemask(self.gamma_of(q_BLNH), length=self.length, sink=sinks_N)
            q_TNH, k_TNH, v_TNH = [x.flatten(0, 1).to(dtype) for x in (q_BLNH, k_BLNH, v_BLNH)]
            out_TNH = varlen_attn(
                q_TNH, k_TNH, v_TNH, packed.cu_seq_q, packed.cu_seq_k, packed.max_q, packed.max_k,
                scale=scale, window_size=self.window_size, enable_gqa=enable_gqa, score_mod=mask,
            )  # fmt: skip
            out_BLNH = out_TNH.unflatten(0, q_BLNH.shape[:2]).to(q_BLNH.dtype)
        return _typed_as(q_BLNH, out_BLNH)


def _sinks(placed: PlacedMask, out_transform: OutTransform | None) -> Tensor | None:
    """The model's sinks, which do what its out_transform would."""
    if (placed.sinks is None) != (out_transform is None):
        raise TypeError("out_transform is served where it applies the model's sinks, and nothing else")
    return placed.sinks


def _typed_as(q_BLNH: Tensor, out_BLNH: Tensor) -> Tensor:
    """Tell torchtitan's SPMD type checker that the output is sharded as the query is."""
    if get_spmd_backend() == "spmd_types" and spmd.is_type_checking():
        like_q: Any = spmd.get_local_type(q_BLNH)
        spmd.assert_type(out_BLNH, like_q, get_partition_spec(q_BLNH))
    return out_BLNH
