"""The engines: library kernels for ordinary causal attention, and what they have in common.

A kernel engine is a module with

    forward(call) -> (out (B, H, S, D), lse (B, H, S), state)
    backward(call, grad_out, out, lse, state, want_bias) -> (dq, dk, dv, dbias)

where out and lse are those of ordinary attention, natural log, lse -inf for a row that sees nothing, and backward is the
library's ordinary one, to be called with StableMask's out' and lse' (+inf for a row that has neither keys nor mass). flex and
dense differentiate by themselves. choose.py says which one serves a call.

Lists, not generators, are unpacked in what torch.compile traces: under activation checkpointing Dynamo (2.14) fails on a
generator with "generator already executing".
"""

from typing import NamedTuple, TypeAlias

from torch import Tensor

State: TypeAlias = tuple[Tensor, ...]
Forward: TypeAlias = tuple[Tensor, Tensor, State]
Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Settings(NamedTuple):
    """All of a call that is not a tensor.

    causal: the kernel's own flag. may_be_dead: some row may see no key. window: keys seen to the left, -1 for all; it and
    max_q, max_k, the longest documents, are varlen's.
    """

    causal: bool
    scale: float
    dropout_p: float = 0.0
    may_be_dead: bool = False
    window: int = -1
    max_q: int = 0
    max_k: int = 0


class Call(NamedTuple):
    """q, k, v are (B, H, S, D), or (T, H, D) with cu_q, cu_k for the varlen engines; bias is (1|B, 1|H, S, T)."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    settings: Settings


def rows_contiguous(x: Tensor) -> Tensor:
    """Kernels read whole rows: the last dimension must be dense."""
    return x if x.stride(-1) == 1 else x.contiguous()
