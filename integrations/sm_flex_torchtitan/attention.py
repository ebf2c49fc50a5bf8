"""torchtitan's inner attentions with StableMask, and the GQAttention that tells them the positions.

GQAttention knows where in its document each token is and tells only its rotary embedding. Here it hands the positions on
with the mask, which travels through the sharding, checkpointing and compiling around the inner attention as it always does.

Shapes in names, as in torchtitan: B batch, L sequence (of this rank), N heads (of this rank), H head dim, T tokens of the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import spmd_types as spmd
import torch
from spmd_types.runtime import get_partition_spec
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask
from torchtitan.distributed.compile import maybe_regional_inductor
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.utils import get_spmd_backend
from torchtitan.models.common.attention import FlexAttention, GQAttention, VarlenAttention, VarlenMetadata
from torchtitan.protocols.module import Module

from sm_flex import flex_attention, stablemask, varlen_attn


class PlacedMask(NamedTuple):
    """Who sees whom, and the position of each token in its document (B, L)."""

    mask: BlockMask | VarlenMetadata
    positions: Tensor | None


class PositionedGQAttention(GQAttention):
    """GQAttention whose inner attention is told the positions."""

    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        pass

    def forward(self, x_BLD: Tensor, attention_masks: Any, positions: Tensor | None = None) -> Tensor:
        placed: Any = PlacedMask(attention_masks, positions)
        return super().forward(x_BLD, placed, positions)


class _Gamma(Module):
    """gamma of every head of the model as a buffer, and the slice of it that this tensor-parallel rank needs.

    The buffer is not persistent: a checkpoint holds nothing that the stock model's does not.
    """

    gamma: Tensor

    def set_gamma(self, gamma: tuple[float, ...], length: int) -> None:
        self.gamma_of_all, self.length, self.tp_rank = gamma, length, 0
        self.register_buffer("gamma", torch.tensor(gamma), persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        # The model is built on the meta device, and this called when it lies on its own.
        self.gamma = torch.tensor(self.gamma_of_all, device=buffer_device or self.gamma.device)

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        super().parallelize(parallel_dims)
        if parallel_dims.tp_enabled:
            self.tp_rank = parallel_dims.get_mesh("tp").get_local_rank()

    def gamma_of(self, q_BLNH: Tensor) -> Tensor:
        """(N,), gamma of the heads of this rank, which holds a run of them."""
        heads = q_BLNH.shape[2]
        return _local(self.gamma).narrow(0, self.tp_rank * heads, heads)


class StableFlexAttention(_Gamma, FlexAttention):
    """FlexAttention with StableMask. Its BlockMask is torchtitan's: causal, within documents."""

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        gamma: tuple[float, ...]
        length: int

    _options: ClassVar[dict[str, Any]] = {**FlexAttention.inductor_configs}
    # Compiled as FlexAttention compiles torch's: one region, which selective checkpointing saves as one op.
    compiled: ClassVar[Callable[..., Any]] = torch.compile(flex_attention, options=_options)
    eager: ClassVar[Callable[..., Any]] = staticmethod(flex_attention)  # a CPU has no flex kernel to compile

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.set_gamma(config.gamma, config.length)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: PlacedMask,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        block_mask, positions_BL = attention_masks
        if not isinstance(block_mask, BlockMask) or positions_BL is None:
            raise TypeError(f"attention_masks must be a BlockMask, with positions, got {type(block_mask).__name__}")
        attend = StableFlexAttention.compiled if q_BLNH.is_cuda else StableFlexAttention.eager
        # ordered=False: under context parallelism this rank has some queries and all keys, both in the order of a load
        # balancer, and the BlockMask alone knows it.
        with maybe_regional_inductor(FlexAttention.inductor_configs), spmd.no_typecheck():
            mask = stablemask(self.gamma_of(q_BLNH), length=self.length, positions=_local(positions_BL), ordered=False)
            out_BLNH = attend(
                *[x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH)], score_mod=mask,
                block_mask=block_mask, scale=scale, enable_gqa=enable_gqa, kernel_options=self.kernel_options,
            ).transpose(1, 2)  # fmt: skip
        return _typed_as(q_BLNH, out_BLNH)


class StableVarlenAttention(_Gamma, VarlenAttention):
    """VarlenAttention with StableMask, whose positions restart in each document."""

    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):
        gamma: tuple[float, ...]
        length: int

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.set_gamma(config.gamma, config.length)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: PlacedMask,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        packed = attention_masks.mask
        if not isinstance(packed, VarlenMetadata):
            raise TypeError(f"attention_masks must be VarlenMetadata, got {type(packed).__name__}")
        # The kernels for packed documents know bf16 and fp16 only; torchtitan casts likewise.
        dtype = torch.bfloat16 if q_BLNH.is_cuda else q_BLNH.dtype
        with spmd.no_typecheck():
            mask = stablemask(self.gamma_of(q_BLNH), length=self.length)
            q_TNH, k_TNH, v_TNH = [x.flatten(0, 1).to(dtype) for x in (q_BLNH, k_BLNH, v_BLNH)]
            out_TNH = varlen_attn(
                q_TNH, k_TNH, v_TNH, packed.cu_seq_q, packed.cu_seq_k, packed.max_q, packed.max_k,
                scale=scale, window_size=self.window_size, enable_gqa=enable_gqa, score_mod=mask,
            )  # fmt: skip
            out_BLNH = out_TNH.view_as(q_BLNH).to(q_BLNH.dtype)
        return _typed_as(q_BLNH, out_BLNH)


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _typed_as(q_BLNH: Tensor, out_BLNH: Tensor) -> Tensor:
    """Tell torchtitan's SPMD type checker that the output is sharded as the query is."""
    if get_spmd_backend() == "spmd_types" and spmd.is_type_checking():
        like_q: Any = spmd.get_local_type(q_BLNH)
        spmd.assert_type(out_BLNH, like_q, get_partition_spec(q_BLNH))
    return out_BLNH
