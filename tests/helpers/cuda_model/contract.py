"""What PyTorch's CUDA attention ops take for granted of what they are given: shapes, dtypes and memory, no values.

Each function has the signature of an op (schemas of torch 2.14.1) and raises ContractError where the kernel would refuse the
call, or would read other memory than the caller means. They look at metadata alone, so they hold for fake CUDA tensors
(spy.py) as for the CPU tensors of the model.

Each assumption names its source. Files ending in .h, .cu and .cpp are those of pytorch/pytorch under
aten/src/ATen/native; kernel_forward.h and kernel_backward.h (mem_eff_attention) also come with the wheel.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
LSE_ALIGNMENT = 32  # kernel_forward.h: kAlignLSE


class ContractError(AssertionError):
    """A call that the kernel would refuse, or would read other memory for than the caller means."""


def need(holds: bool, what: str) -> None:
    if not holds:
        raise ContractError(what)


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> None:
    _flash_inputs("flash", query, key, value)
    need(query.dim() == key.dim() == value.dim() == 4, "flash: q, k and v have four dimensions")
    need(key.shape == value.shape and query.shape[0] == key.shape[0], "flash: k like v, one batch size")
    need(query.shape[1] % key.shape[1] == 0, "flash: query heads are a multiple of key heads")  # flash_api.cpp, mha_fwd


def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> None:
    flash_forward(query, key, value)
    need(cum_seq_q is None and cum_seq_k is None, "flash: a dense call has no cum_seq")
    need((max_q, max_k) == (query.shape[2], key.shape[2]), "flash: max_q and max_k are the lengths")
    _like("flash", query.shape, query.dtype, out=out, grad_out=grad_out)  # flash_api.cpp: CHECK_SHAPE; both are copied
    _raw_lse("flash", logsumexp, query.shape[:3])  # flash_api.cpp, mha_bwd: softmax_lse.data_ptr() of (B, H, S)
    _flash_state("flash", philox_seed, philox_offset)


def packed_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> None:
    _packed_inputs(query, key, value, cum_seq_q, cum_seq_k)


def packed_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> None:
    _packed_inputs(query, key, value, cum_seq_q, cum_seq_k)
    # attention_backward.cu, _flash_attention_backward: out and grad_out are made contiguous, so any strides will do.
    _like("packed flash", query.shape, query.dtype, out=out, grad_out=grad_out)
    _raw_lse("packed flash", logsumexp, (query.shape[1], query.shape[0]))  # mha_varlen_bwd: h x total_q, unpadded_lse
    need(rng_state.shape == (2,) and rng_state.dtype == torch.uint64, "packed flash: rng_state is seed and offset, uint64")


def cudnn_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> None:
    _inputs("cudnn", query, key, value, HALF)
    # cuda/sdp_utils.cpp, check_cudnn_tensor_shapes: multiples of 8 up to 128 on every card, and more than one key.
    need(query.shape[-1] % 8 == 0 and value.shape[-1] % 8 == 0, "cudnn: head dims are multiples of 8")
    need(max(query.shape[-1], value.shape[-1]) <= 128, "cudnn: head dims up to 128")
    need(key.shape[2] > 1, "cudnn: more than one key")
    need(query.shape[1] % key.shape[1] == 0, "cudnn: query heads are a multiple of key heads")
    need(dropout_p * 16 % 1 == 0, "cudnn: dropout_p is a multiple of 1/16")  # check_cudnn_dropout
    need(compute_log_sumexp, "cudnn: without compute_log_sumexp there is no lse")
    if attn_bias is not None:
        # cudnn/MHA.cpp: the graph takes the bias' sizes and strides as they are, in the dtype of q.
        sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        need(attn_bias.dim() == 4 and attn_bias.dtype == query.dtype, f"cudnn: bias of q's dtype, got {attn_bias.dtype}")
        fits = all(n in (1, size) for n, size in zip(attn_bias.shape, sizes, strict=True))
        need(fits and attn_bias.shape[2:] == sizes[2:], f"cudnn: bias (1|B, 1|H, S, T), got {tuple(attn_bias.shape)}")


def cudnn_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    attn_bias: Tensor | None,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None = None,
) -> None:
    cudnn_forward(query, key, value, attn_bias, True, dropout_p, is_causal)
    need(cum_seq_q is None and cum_seq_k is None, "cudnn: a dense call has no cum_seq")
    need((max_q, max_k) == (query.shape[2], key.shape[2]), "cudnn: max_q and max_k are the lengths")
    _like("cudnn", (*query.shape[:3], value.shape[-1]), query.dtype, out=out, grad_out=grad_out)
    need(out.stride(-1) == 1, "cudnn: dense rows of out")
    # torch/_meta_registrations.py: the statistics have a last dimension of 1 (from torch 2.9 on).
    _raw_lse("cudnn", logsumexp, (*query.shape[:3], 1))
    _scalar_state("cudnn", philox_seed, philox_offset)


def efficient_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> None:
    _inputs("efficient", query, key, value, (*HALF, torch.float32))
    # attention_backward.cu: TORCH_CHECK(query.size(2) == key.size(2)), and the same of value.
    need(query.shape[1] == key.shape[1] == value.shape[1], "efficient: k and v have as many heads as q")
    need(compute_log_sumexp, "efficient: without compute_log_sumexp there is no lse")
    # cuda/sdp_utils.cpp, check_head_dim_size_mem_efficient and the check of storage offsets: 16 bytes.
    alignment = 16 // query.element_size()
    for name, x in (("q", query), ("k", key), ("v", value)):
        need(x.shape[-1] % alignment == 0, f"efficient: the head dim of {name} is a multiple of {alignment}")
        need(int(x.storage_offset()) % alignment == 0, f"efficient: {name} starts at 16 bytes")
        _aligned("efficient", name, x, alignment)  # kernel_forward.h, check_supported
    if attn_bias is not None:
        shape = (*query.shape[:3], key.shape[2])
        # attention_backward.cu: "invalid dtype for bias", "wrong shape", "last dimension must be contiguous".
        need(attn_bias.dtype == query.dtype, f"efficient: bias of q's dtype, got {attn_bias.dtype}")
        need(attn_bias.shape == shape, f"efficient: bias {shape}, expanded, got {tuple(attn_bias.shape)}")
        need(attn_bias.stride(-1) == 1, "efficient: dense rows of the bias")
        _aligned("efficient", "attn_bias", attn_bias, alignment)  # kernel_forward.h: "attn_bias is not correctly aligned"


def efficient_backward(
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    dropout_p: float,
    grad_input_mask: Sequence[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> None:
    efficient_forward(query, key, value, attn_bias, True, dropout_p, is_causal)
    batch, heads, rows = query.shape[:3]
    _like("efficient", (batch, heads, rows, value.shape[-1]), query.dtype, out=out, grad_out=grad_out_)
    if query.dtype in HALF and rows > 1:
        # kernel_backward.h: o_strideM() is head_dim_value * num_heads, and kKernelComputesDelta reads out where kIsHalf.
        row = heads * value.shape[-1]
        need(out.stride(2) == row, f"efficient: out lies in (B, S, H, D) memory, rows {row} apart, got {out.stride()}")
    need(out.stride(-1) == 1, "efficient: dense rows of out")
    padded = -(-rows // LSE_ALIGNMENT) * LSE_ALIGNMENT
    shape = (batch, heads, padded)  # kernel_forward.h: lse_dim, "block size of backward"
    need(logsumexp.dtype == torch.float32, "efficient: lse is float32")
    need(logsumexp.shape == shape, f"efficient: lse padded to {LSE_ALIGNMENT} rows, {shape}, got {tuple(logsumexp.shape)}")
    need(logsumexp.stride(-1) == 1, "efficient: dense rows of lse")
    _aligned("efficient", "lse", logsumexp, 8)  # kernel_backward.h: "LSE is not correctly aligned"
    need(attn_bias is not None or not grad_input_mask[3], "efficient: no gradient of a bias that is not there")
    _scalar_state("efficient", philox_seed, philox_offset)


def varlen_forward(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, *_: Any, **__: Any) -> None:
    """torch_attn::_varlen_attn, whose flash branch hands these on (torch/nn/attention/varlen.py)."""
    _packed_inputs(query, key, value, cu_seq_q, cu_seq_k)


def varlen_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    *_: Any,
) -> None:
    ends = (cu_seq_q, cu_seq_k, max_q, max_k, 0.0, is_causal)
    packed_backward(grad_out, query, key, value, out, lse, *ends, rng_state, rng_state)


_ATEN, _VARLEN = torch.ops.aten, torch.ops.torch_attn
CONTRACTS: dict[Any, Callable[..., None]] = {
    _ATEN._scaled_dot_product_flash_attention.default: flash_forward,
    _ATEN._scaled_dot_product_flash_attention_backward.default: flash_backward,
    _ATEN._flash_attention_forward.default: packed_forward,
    _ATEN._flash_attention_backward.default: packed_backward,
    _ATEN._scaled_dot_product_cudnn_attention.default: cudnn_forward,
    _ATEN._scaled_dot_product_cudnn_attention_backward.default: cudnn_backward,
    _ATEN._scaled_dot_product_efficient_attention.default: efficient_forward,
    _ATEN._scaled_dot_product_efficient_attention_backward.default: efficient_backward,
    _VARLEN._varlen_attn.default: varlen_forward,
    _VARLEN._varlen_attn_backward.default: varlen_backward,
}


def _inputs(op: str, query: Tensor, key: Tensor, value: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    need(query.dtype in dtypes, f"{op}: dtype {query.dtype}")
    for name, x in (("q", query), ("k", key), ("v", value)):
        need(x.dtype == query.dtype, f"{op}: {name} of q's dtype, got {x.dtype}")
        need(x.stride(-1) == 1, f"{op}: dense rows of {name}, got {x.stride()}")  # "must have contiguous last dimension"
    need(query.shape[-1] == key.shape[-1], f"{op}: q and k of one head dim")


def _flash_inputs(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    _inputs(op, query, key, value, HALF)
    # flash_api.cpp, mha_fwd: head_size % 8 == 0 and <= 256; attention.cu pads in the composite function, not in this op.
    dims = {x.shape[-1] for x in (query, key, value)}
    need(len(dims) == 1 and max(dims) % 8 == 0 and max(dims) <= 256, f"{op}: one head dim, a multiple of 8 up to 256: {dims}")
    for name, x in (("q", query), ("k", key), ("v", value)):
        _aligned(op, name, x, 8)  # kernel_traits.h: kGmemElemsPerLoad, 16 bytes a load


def _packed_inputs(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor) -> None:
    _flash_inputs("packed flash", query, key, value)
    need(query.dim() == key.dim() == value.dim() == 3, "packed flash: q, k and v have three dimensions")
    need(key.shape == value.shape and query.shape[1] % key.shape[1] == 0, "packed flash: heads")
    for name, cu in (("cu_seq_q", cu_q), ("cu_seq_k", cu_k)):
        need(cu.dtype == torch.int32, f"packed flash: {name} is int32")  # flash_api.cpp: "must have dtype int32"
        need(bool(cu.dim() == 1 and cu.is_contiguous()), f"packed flash: {name} is contiguous")  # CHECK_CONTIGUOUS
    need(cu_q.shape == cu_k.shape, "packed flash: as many documents of keys as of queries")


def _aligned(op: str, name: str, x: Tensor, alignment: int) -> None:
    """The stride of every dimension that is walked, but the last, is a multiple of alignment."""
    strides = [stride for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    need(all(s % alignment == 0 for s in strides), f"{op}: {name} has strides {x.stride()}, not multiples of {alignment}")


def _like(op: str, shape: Sequence[int], dtype: torch.dtype, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        need(tuple(x.shape) == tuple(shape), f"{op}: {name} {tuple(shape)}, got {tuple(x.shape)}")
        need(x.dtype == dtype, f"{op}: {name} of q's dtype, got {x.dtype}")


def _raw_lse(op: str, lse: Tensor, shape: Sequence[int]) -> None:
    """Read by its pointer alone, as if contiguous."""
    need(lse.dtype == torch.float32, f"{op}: lse is float32, got {lse.dtype}")
    need(tuple(lse.shape) == tuple(shape), f"{op}: lse {tuple(shape)}, got {tuple(lse.shape)}")
    need(bool(lse.is_contiguous()), f"{op}: contiguous lse, got strides {lse.stride()}")


def _flash_state(op: str, seed: Tensor, offset: Tensor) -> None:
    """mha_fwd returns rng_state (2,), seed and offset in one, and an unused 0-d tensor beside it."""
    need(seed.shape == (2,) and seed.dtype == torch.uint64, f"{op}: philox_seed is the rng_state (2,), got {tuple(seed.shape)}")
    need(offset.shape == (), f"{op}: philox_offset is the unused tensor, got {tuple(offset.shape)}")


def _scalar_state(op: str, seed: Tensor, offset: Tensor) -> None:
    """attention.cu: two 0-d int64 tensors, which metadata cannot tell from each other."""
    for x in (seed, offset):
        need(x.shape == () and x.dtype == torch.int64, f"{op}: philox_seed and philox_offset are 0-d int64, got {tuple(x.shape)}")
