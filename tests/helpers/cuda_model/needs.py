"""What the contracts of the ops have in common (contract.py)."""

from collections.abc import Sequence

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
LSE_ALIGNMENT = 32  # kernel_forward.h: kAlignLSE


class ContractError(AssertionError):
    """A call that the kernel would refuse, or would read other memory for than the caller means."""


def need(holds: bool, what: str) -> None:
    if not holds:
        raise ContractError(what)


def inputs(op: str, query: Tensor, key: Tensor, value: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    need(query.dtype in dtypes, f"{op}: dtype {query.dtype}")
    for name, x in (("q", query), ("k", key), ("v", value)):
        need(x.dtype == query.dtype, f"{op}: {name} of q's dtype, got {x.dtype}")
        need(x.stride(-1) == 1, f"{op}: dense rows of {name}, got {x.stride()}")  # "must have contiguous last dimension"
    need(query.shape[-1] == key.shape[-1], f"{op}: q and k of one head dim")


def flash_inputs(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    inputs(op, query, key, value, HALF)
    # flash_api.cpp, mha_fwd: head_size % 8 == 0 and <= 256; attention.cu pads in the composite function, not in this op.
    dims = {x.shape[-1] for x in (query, key, value)}
    need(len(dims) == 1 and max(dims) % 8 == 0 and max(dims) <= 256, f"{op}: one head dim, a multiple of 8 up to 256: {dims}")
    for name, x in (("q", query), ("k", key), ("v", value)):
        aligned(op, name, x, 8)  # kernel_traits.h: kGmemElemsPerLoad, 16 bytes a load


def packed_inputs(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor) -> None:
    flash_inputs("packed flash", query, key, value)
    need(query.dim() == key.dim() == value.dim() == 3, "packed flash: q, k and v have three dimensions")
    need(key.shape == value.shape and query.shape[1] % key.shape[1] == 0, "packed flash: heads")
    for name, cu in (("cu_seq_q", cu_q), ("cu_seq_k", cu_k)):
        need(cu.dtype == torch.int32, f"packed flash: {name} is int32")  # flash_api.cpp: "must have dtype int32"
        need(bool(cu.dim() == 1 and cu.is_contiguous()), f"packed flash: {name} is contiguous")  # CHECK_CONTIGUOUS
    need(cu_q.shape == cu_k.shape, "packed flash: as many documents of keys as of queries")


def aligned(op: str, name: str, x: Tensor, alignment: int) -> None:
    """The stride of every dimension that is walked, but the last, is a multiple of alignment."""
    strides = [stride for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    need(all(s % alignment == 0 for s in strides), f"{op}: {name} has strides {x.stride()}, not multiples of {alignment}")


def like(op: str, shape: Sequence[int], dtype: torch.dtype, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        need(tuple(x.shape) == tuple(shape), f"{op}: {name} {tuple(shape)}, got {tuple(x.shape)}")
        need(x.dtype == dtype, f"{op}: {name} of q's dtype, got {x.dtype}")


def raw_lse(op: str, lse: Tensor, shape: Sequence[int]) -> None:
    """Read by its pointer alone, as if contiguous."""
    need(lse.dtype == torch.float32, f"{op}: lse is float32, got {lse.dtype}")
    need(tuple(lse.shape) == tuple(shape), f"{op}: lse {tuple(shape)}, got {tuple(lse.shape)}")
    need(bool(lse.is_contiguous()), f"{op}: contiguous lse, got strides {lse.stride()}")


def flash_state(op: str, seed: Tensor, offset: Tensor) -> None:
    """mha_fwd returns rng_state (2,), seed and offset in one, and an unused 0-d tensor beside it."""
    need(seed.shape == (2,) and seed.dtype == torch.uint64, f"{op}: philox_seed is the rng_state (2,), got {tuple(seed.shape)}")
    need(offset.shape == (), f"{op}: philox_offset is the unused tensor, got {tuple(offset.shape)}")


def scalar_state(op: str, seed: Tensor, offset: Tensor) -> None:
    """attention.cu: two 0-d int64 tensors, which metadata cannot tell from each other."""
    for x in (seed, offset):
        need(x.shape == () and x.dtype == torch.int64, f"{op}: philox_seed and philox_offset are 0-d int64, got {tuple(x.shape)}")
