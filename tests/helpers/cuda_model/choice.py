"""Which kernel torch would take on a GPU (cuda/sdp_utils.cpp of torch 2.14, an H100): asked on the CPU it knows none of them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from tests.helpers.cuda_model.contract import HALF

ERROR = -1
# _fused_sdp_choice goes through them in this order on Hopper and Blackwell.
IN_ORDER = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def can_use_flash_attention(params: Any, debug: bool = False) -> bool:
    dims = {x.shape[-1] for x in (params.query, params.key, params.value)}
    square = params.query.shape[2] == params.key.shape[2]
    return (
        torch.backends.cuda.flash_sdp_enabled()
        and _one_dtype(params, HALF)
        and params.attn_mask is None
        and len(dims) == 1
        and max(dims) <= 256
        and (square or not params.is_causal)  # check_flash_causal_non_square_seqlens
        and _heads_fit(params, grouped=True)
    )


def can_use_cudnn_attention(params: Any, debug: bool = False) -> bool:
    dims = [x.shape[-1] for x in (params.query, params.value)]
    mask = params.attn_mask
    return (
        torch.backends.cuda.cudnn_sdp_enabled()
        and _one_dtype(params, HALF)
        and max(dims) <= 128
        and not any(n % 8 for n in dims)
        and params.key.shape[2] > 1
        and (params.query.shape[2] > 1 or not params.dropout)
        and params.dropout * 16 % 1 == 0
        and (mask is None or not mask.requires_grad)
        and _heads_fit(params, grouped=True)
    )


def can_use_efficient_attention(params: Any, debug: bool = False) -> bool:
    alignment = 16 // params.query.element_size()  # check_head_dim_size_mem_efficient
    return (
        torch.backends.cuda.mem_efficient_sdp_enabled()
        and _one_dtype(params, (*HALF, torch.float32))
        and not any(x.shape[-1] % alignment for x in (params.query, params.value))
        and not any(x.storage_offset() % alignment for x in (params.query, params.key, params.value))
        and _heads_fit(params, grouped=False)
    )


CAN_USE = {"cudnn": can_use_cudnn_attention, "flash": can_use_flash_attention, "efficient": can_use_efficient_attention}


def fused_sdp_choice(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> int:
    params = torch.backends.cuda.SDPAParams(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    for name, backend in IN_ORDER.items():
        if CAN_USE[name](params):
            return backend.value
    return SDPBackend.MATH.value if torch.backends.cuda.math_sdp_enabled() else ERROR


def patch_torch(patch: pytest.MonkeyPatch) -> None:
    """torch answers by this file."""
    patch.setattr(torch, "_fused_sdp_choice", fused_sdp_choice)
    for name, can_use in CAN_USE.items():
        patch.setattr(torch.backends.cuda, f"can_use_{name}_attention", can_use)


def _one_dtype(params: Any, dtypes: tuple[torch.dtype, ...]) -> bool:
    return params.query.dim() == 4 and all(x.dtype == params.query.dtype in dtypes for x in (params.key, params.value))


def _heads_fit(params: Any, grouped: bool) -> bool:
    """check_batch_size_and_num_heads_dense: the memory-efficient kernel has no grouped heads."""
    heads, kv_heads = params.query.shape[1], params.key.shape[1]
    return heads == kv_heads or (grouped and params.enable_gqa and heads % kv_heads == 0)
