"""The training steps that are compiled: attention and the projection after it, ours and PyTorch's own.

Shapes: B batch, H heads, S rows, D head dim. q, k and v are (B, H, S, D) over (B, S, H, D) memory, as a linear
layer leaves them, or contiguous where the name says BHSD. Packed rows are (T, H, D).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.attention.flex_attention import flex_attention as torch_flex
from torch.nn.attention.varlen import varlen_attn as torch_varlen

from sm_flex import flex_attention, scaled_dot_product_attention, stablemask, varlen_attn
from sm_flex.engines import torch_choice
from sm_flex.runtime import cudnn_op, efficient_op, flash_op

B, H, S, D, N = 2, 4, 256, 64, 600
LARGE = B * H * S * D
BF16 = torch.bfloat16
EFFICIENT = torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION.value
Attention = Callable[..., Tensor]


class Case(NamedTuple):
    """ours takes (q, k, v, gamma, *extra), plain (q, k, v, *extra)."""

    ours: Attention
    plain: Attention
    extra: Callable[[], list[Tensor]] = list
    bhsd: bool = False
    packed: bool = False
    learned: bool = False


def steps(case: Case) -> dict[str, tuple[Callable[..., Tensor], Callable[[], list[Tensor]]]]:
    """(function, inputs) of each of the two. Where torch's choice is asked for, it is the memory-efficient kernel."""
    torch_choice._traced_choice = _efficient

    def layer(attention: Attention) -> Callable[..., Tensor]:
        def run(w: Tensor, *inputs: Tensor) -> Tensor:
            out = attention(*inputs)
            rows = out if case.packed else out.transpose(1, 2)
            return rows.flatten(-2) @ w

        return run

    def rows() -> Tensor:
        if case.packed:
            return _empty(B * S, H, D).requires_grad_()
        x = _empty(B, H, S, D) if case.bhsd else _empty(B, S, H, D).transpose(1, 2)
        return x.requires_grad_()

    def inputs(*more: Tensor) -> list[Tensor]:
        return [_empty(H * D, H * D).requires_grad_(), rows(), rows(), rows(), *more]

    gamma = lambda: torch.empty(H, device="cuda").requires_grad_(case.learned)  # noqa: E731
    return {
        "StableMask": (layer(case.ours), lambda: inputs(gamma(), *case.extra())),
        "plain": (layer(case.plain), lambda: inputs(*case.extra())),
    }


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=BF16)


def _by(backend: str, **options: Any) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
        mask = stablemask(gamma, length=N, **options)
        return flex_attention(q, k, v, score_mod=mask, kernel_options={"BACKEND": backend})  # pyright: ignore

    return run


def _number_inside(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    mask = stablemask(0.25, length=N)
    return flex_attention(q, k, v, score_mod=mask, kernel_options={"BACKEND": "FLASH_ATTENTION"})  # pyright: ignore


def _through_lse(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    options: Any = {"kernel_options": {"BACKEND": "FLASH_ATTENTION"}, "return_aux": AuxRequest(lse=True)}
    out, aux = flex_attention(q, k, v, score_mod=stablemask(gamma, length=N), **options)
    return out * aux.lse.unsqueeze(-1).to(out.dtype)  # pyright: ignore[reportOptionalMemberAccess]


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_op(q, k, v, 0.0, True, False, scale=0.125)[0]


def _flash_through_lse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse, *_ = flash_op(q, k, v, 0.0, True, False, scale=0.125)
    return out * lse.detach().unsqueeze(-1).to(out.dtype)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return cudnn_op(q, k, v, None, True, 0.0, True, False, scale=0.125)[0]


def _masked(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, attn_mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, score_mod=stablemask(gamma, length=N))


@torch.compiler.assume_constant_result
def _efficient(*_: Any) -> int:
    """torch's choice for a call with a mask, where there is no device to ask."""
    return EFFICIENT


def _efficient_plain(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    causal = torch.ones(S, S, dtype=torch.bool, device=q.device).tril()
    bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~(attn_mask & causal), -torch.inf)
    return efficient_op(q, k, v, bias.expand(B, H, S, S), True, 0.0, False, scale=0.125)[0]


def _packed(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, cu: Tensor) -> Tensor:
    mask = stablemask(gamma, length=N)
    return varlen_attn(q, k, v, cu, cu, S, S, window_size=(-1, 0), score_mod=mask)  # pyright: ignore


def _packed_plain(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    return torch_varlen(q, k, v, cu, cu, S, S, window_size=(-1, 0))  # pyright: ignore[reportReturnType]


def _alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score - torch.exp2(-(h + 1.0)) * (q_idx - kv_idx)


def _flex(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    return flex_attention(q, k, v, score_mod=stablemask(gamma, length=N, score_mod=_alibi))  # pyright: ignore


def _flex_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch_flex(q, k, v, score_mod=_alibi)  # pyright: ignore[reportReturnType]


def _bounds() -> list[Tensor]:
    return [torch.empty(5, device="cuda", dtype=torch.int32)]


def _mask() -> list[Tensor]:
    return [torch.empty(B, 1, S, S, device="cuda", dtype=torch.bool)]


CASES = {
    "flash": Case(_by("FLASH_ATTENTION"), _flash),
    "flash, a number inside": Case(_number_inside, _flash),
    "flash, gamma learned": Case(_by("FLASH_ATTENTION"), _flash, learned=True),
    "flash, a gradient of lse": Case(_through_lse, _flash_through_lse),
    "cudnn": Case(_by("CUDNN_ATTENTION"), _cudnn),
    "cudnn, BHSD": Case(_by("CUDNN_ATTENTION"), _cudnn, bhsd=True),
    "efficient, a mask": Case(_masked, _efficient_plain, _mask),
    "varlen": Case(_packed, _packed_plain, _bounds, packed=True),
    "varlen, gamma learned": Case(_packed, _packed_plain, _bounds, packed=True, learned=True),
    "flex, a score_mod": Case(_flex, _flex_plain),
}
