"""gamma of every head of an attention: fixed, or learned as a parameter of the model.

A learned gamma is softplus(start + shift), with softplus(start) the gamma that was asked for and shift a parameter that starts
at 0. So the start is exact however a trainer rounds its parameters (mixed precision casts them to bf16, which would move a
parameter of -5.5, that of gamma = 0.004, by 0.4 %), and weight decay pulls towards the gamma that was asked for.

Shapes in names, as in torchtitan: N heads (of this rank).
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import softplus
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.protocols.module import Module


class GammaConfig(Protocol):
    """gamma: one for each query head of the model. length: N. learned: gamma is a parameter, which starts there."""

    gamma: tuple[float, ...]
    length: int
    learned: bool


class HasGamma(Module):
    """gamma of every head of the model as a buffer, and the slice of it that this tensor-parallel rank needs.

    The buffer is in the checkpoint where gamma is learned, since the parameter counts from it. Otherwise a checkpoint holds
    nothing that the stock model's does not.
    """

    gamma: Tensor
    gamma_shift: Tensor | None

    def set_gamma(self, config: GammaConfig) -> None:
        self.gamma_of_all, self.length, self.tp_rank = config.gamma, config.length, 0
        self.register_buffer("gamma", torch.tensor(config.gamma, dtype=torch.float32), persistent=config.learned)
        self.register_parameter("gamma_shift", nn.Parameter(torch.zeros(len(config.gamma))) if config.learned else None)

    def reset_parameters(self) -> None:
        if self.gamma_shift is not None:
            nn.init.zeros_(self.gamma_shift)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        # The model is built on the meta device, and this called when it lies on its own.
        self.gamma = torch.tensor(self.gamma_of_all, dtype=self.gamma.dtype, device=buffer_device or self.gamma.device)

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        super().parallelize(parallel_dims)
        if parallel_dims.tp_enabled:
            self.tp_rank = parallel_dims.get_mesh("tp").get_local_rank()

    def gamma_of(self, q_BLNH: Tensor) -> Tensor:
        """(N,), gamma of the heads of this rank, which holds a run of them."""
        heads = q_BLNH.shape[2]
        gamma_N = local(self.gamma).narrow(0, self.tp_rank * heads, heads)
        if self.gamma_shift is None:
            return gamma_N
        start_N = gamma_N + torch.log(-torch.expm1(-gamma_N))
        return softplus(start_N + local(self.gamma_shift).to(start_N.dtype))


def local(x: Tensor) -> Tensor:
    """This rank's part, whose gradient is this rank's part too."""
    return x.to_local(grad_placements=x.placements) if isinstance(x, DTensor) else x
