"""The engines: what a call needs of one, what it is given, and what it answers.

An engine is a module. refuses(need) says why it cannot serve a call, or None. A kernel engine runs a
library's kernel for ordinary causal attention, and also has

    forward(call) -> (out (B, H, S, D), lse (B, H, S), state)
    backward(call, grad_out, out, lse, state, bias_grad) -> (dq, dk, dv, dbias)

where out and lse are those of ordinary attention: natural log, lse = -inf for a fully masked row. backward is
the library's ordinary backward, which autograd.py calls with StableMask's out' and lse' (lse' = +inf for a
row that has neither keys nor mass). The engines flex and dense differentiate by themselves. choose.py says
which engine serves a call.

Shapes in names, here and in all engines: B batch, H query heads, S queries, T keys, D head dim. k_BHTD and
v_BHTD may have fewer heads, and v another head dim. Packed documents are (S, H, D) and (T, H, D).

Lists, not generators, are unpacked in what torch.compile traces: under activation checkpointing Dynamo (2.14)
fails on a generator with "generator already executing".
"""

from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from sm_flex.runtime import device_type

State: TypeAlias = tuple[Tensor, ...]
Forward: TypeAlias = tuple[Tensor, Tensor, State]
Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Need(NamedTuple):
    """A call as the choice of its engine sees it.

    backend: the BACKEND that was asked for. flex_options: kernel_options other than BACKEND, or max_scores.
    lse_grad: lse' is returned and may get a gradient. packed: q, k, v hold documents after one another.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    attn_mask: Tensor | None = None
    backend: str = "AUTO"
    score_mod: bool = False
    block_mask: bool = False
    flex_options: bool = False
    dropout_p: float = 0.0
    lse_grad: bool = False
    packed: bool = False

    @property
    def device(self) -> str:
        return device_type(self.q.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    @property
    def widest(self) -> int:
        """The larger of the head dims of query and value."""
        return max(self.q.shape[-1], self.v.shape[-1])

    @property
    def empty(self) -> bool:
        return 0 in (*self.q.shape, *self.k.shape, *self.v.shape)


class Call(NamedTuple):
    """What a kernel engine is given.

    q, k, v: (B, H, S, D), or (S, H, D) with cu_q, cu_k for packed documents. bias: (1|B, 1|H, S, T), added to
    the scores.
    causal: the kernel's own flag. may_be_masked: some row may see no key though bias is None.
    window, right: how many keys before and after its own a query of packed documents sees, -1 for all.
    max_q, max_k: the longest documents.
    attn_mask: of a chunk on a CPU, boolean or floating, (1|B, 1|H, 1|S, 1|T), beside causality.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    causal: bool
    scale: float
    dropout_p: float = 0.0
    may_be_masked: bool = False
    window: int = -1
    max_q: int = 0
    max_k: int = 0
    right: int = 0
    attn_mask: Tensor | None = None


class Engine(Protocol):
    def refuses(self, need: Need) -> str | None: ...


class Kernel(Engine, Protocol):
    def forward(self, call: Call) -> Forward: ...

    def backward(self, call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, state: State, bias_grad: bool) -> Gradients: ...


class MaskedKernel(Kernel, Protocol):
    """A kernel of scaled_dot_product_attention."""

    def causality(self, attn_mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor | None, bool]:
        """(bias, the kernel's own causal flag), which show query i the keys j <= i + T - S that attn_mask lets it see."""
        ...


def refuses_extras(need: Need) -> str | None:
    """What no kernel of scaled_dot_product_attention takes."""
    if need.flex_options:
        return "other kernel_options, and max_scores, belong to torch's flex kernels"
    if need.score_mod or need.block_mask:
        return "it takes neither an inner score_mod nor a block_mask"
    if need.empty:
        return "it takes no empty tensor"
    return None


def refuses_on_cuda(need: Need, widest_with_lse_grad: int | None = None) -> str | None:
    """What the kernels of scaled_dot_product_attention on CUDA have in common."""
    extras = refuses_extras(need)
    if extras is not None:
        return extras
    if need.device != "cuda":
        others = "FLASH_ATTENTION and MATH are the only ones" if need.device == "cpu" else "MATH is the only one"
        return f"query is on {need.q.device}, where {others}"
    mask = need.attn_mask
    if mask is not None and mask.is_floating_point() and mask.dtype != need.dtype:
        return "it would round attn_mask to query's dtype"
    # The gradient of lse widens the head dim by 8 (autograd.py), which must stay within what the kernel
    # takes.
    if need.lse_grad and widest_with_lse_grad is not None and need.widest > widest_with_lse_grad:
        return f"with a log-sum-exp that has a gradient it takes head dims up to {widest_with_lse_grad}"
    return None


def one_head_dim(*tensors: Tensor) -> list[Tensor]:
    """The tensors with columns of zeros up to the widest head dim, which change no score and no value.

    For a kernel that wants one head dim for query and value.
    """
    widest = max([x.shape[-1] for x in tensors])
    return [x if x.shape[-1] == widest else pad(x, (0, widest - x.shape[-1])) for x in tensors]


def narrowed(x: Tensor, dim: int) -> Tensor:
    """x without the columns that were added to its head dim."""
    return x if x.shape[-1] == dim else x[..., :dim]


def rows_contiguous(x: Tensor) -> Tensor:
    """Kernels read whole rows: the last dimension must be dense."""
    return x if x.stride(-1) == 1 else x.contiguous()
