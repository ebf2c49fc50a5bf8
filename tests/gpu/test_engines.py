"""Every CUDA engine against the oracle: out, lse, dq, dk, dv, d gamma, and the gradient through lse."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sm_flex import flex_attention, stablemask
from sm_flex.testing import assert_matches_eq11, oracle
from sm_flex.testing.gradients import Attention
from tests.helpers.gpu import DEVICE, HALF, assert_matches_eq11_with_gamma_fixed, name_of
from tests.helpers.problems import flex_with_lse, gamma_of, qkv

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_tile")]

KERNELS = [
    *(("FLASH_ATTENTION", dtype) for dtype in HALF),
    *(("CUDNN_ATTENTION", dtype) for dtype in HALF),
    *(("EFFICIENT_ATTENTION", dtype) for dtype in (*HALF, torch.float32)),
    *(("MATH", dtype) for dtype in (*HALF, torch.float32, torch.float64)),
]
# (rows, head_dim): below, at and above one tile; 40 is a multiple of 8 and not of 16, 60 is padded by flash alone.
SHAPES = [(1, 64), (2, 128), (127, 64), (128, 40), (129, 128), (257, 64), (131, 60)]


BACKENDS = ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]


def takes(backend: str, rows: int, dim: int) -> bool:
    """cuDNN wants more than one key; it and the memory-efficient kernel want a head dim that is a multiple of 8."""
    if dim % 8:
        return backend in ("FLASH_ATTENTION", "MATH")
    return rows > 1 or backend != "CUDNN_ATTENTION"


def flex(backend: str, **kwargs: Any) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, None]:
        options = {"enable_gqa": True, "kernel_options": {"BACKEND": backend}}
        return flex_attention(q, k, v, score_mod=stablemask(gamma, **kwargs), **options), None

    return run


def problem(rows: int, keys: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    return [*qkv(2, 6, 2, rows, keys, dim, dtype, DEVICE), gamma_of(6, dtype, DEVICE)]


@pytest.mark.parametrize(
    ("backend", "dtype", "rows", "dim"),
    [(b, dtype, rows, dim) for b, dtype in KERNELS for rows, dim in SHAPES if takes(b, rows, dim)],
    ids=name_of,
)
@pytest.mark.parametrize("learned", [True, False])
def test_square(backend: str, dtype: torch.dtype, rows: int, dim: int, learned: bool):
    """cuDNN has no room for the columns of a gradient of lse above head_dim 120: there it is out alone."""
    run = (flex_with_lse if backend != "CUDNN_ATTENTION" or dim <= 120 else flex)(backend, length=200)
    check = assert_matches_eq11 if learned else assert_matches_eq11_with_gamma_fixed
    check(run, problem(rows, rows, dim, dtype), {"length": 200})


@pytest.mark.parametrize(("backend", "dtype"), KERNELS, ids=name_of)
@pytest.mark.parametrize("dim", [64, 128])
def test_gradient_through_lse(backend: str, dtype: torch.dtype, dim: int):
    """The kernels get it by 8 more columns; 136 is beyond cuDNN, whose case is head_dim 112 instead."""
    dim = 112 if dim == 128 and backend == "CUDNN_ATTENTION" else dim
    run = flex_with_lse(backend, length=300)
    assert_matches_eq11(run, problem(139, 139, dim, dtype), {"length": 300}, with_lse_grad=True)
    assert_matches_eq11_with_gamma_fixed(run, problem(139, 139, dim, dtype), {"length": 300}, with_lse_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 57, 130, 131, 132, 1000])
def test_lengths_below_at_and_beyond(backend: str, length: int):
    """One gamma for all heads: learned, and a Python number."""
    q, k, v, _ = problem(131, 131, 64, torch.bfloat16)
    for gamma in (0.0, 0.3):
        inputs = [q, k, v, torch.tensor(gamma, device=DEVICE, dtype=torch.float64)]
        run = flex_with_lse(backend, length=length)
        assert_matches_eq11(run, inputs, {"length": length})
        assert_matches_eq11_with_gamma_fixed(run, inputs, {"length": length})


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_mass_left_is_causal_attention(backend: str):
    q, k, v = qkv(2, 3, 3, 131, 131, 64, torch.bfloat16, DEVICE)
    reference, _ = oracle(q, k, v, gamma=math.inf)
    for gamma in (1e4, math.inf, torch.full((3,), math.inf, device=DEVICE)):
        out = flex_attention(q, k, v, score_mod=stablemask(gamma, length=500), kernel_options={"BACKEND": backend})
        plain = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
        torch.testing.assert_close(reference, plain)
        torch.testing.assert_close(out.double(), plain, atol=2**-7, rtol=2**-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("learned", [True, False])
def test_positions_of_the_call_and_of_each_row_of_the_batch(backend: str, learned: bool):
    one = torch.cat([torch.arange(50), torch.arange(81)]).to(DEVICE)
    each = torch.stack([one, torch.arange(7, 138, device=DEVICE)])
    for positions in (one, each, each.int()):
        kwargs = {"length": 100, "positions": positions}
        run = flex_with_lse(backend, **kwargs)
        check = assert_matches_eq11 if learned else assert_matches_eq11_with_gamma_fixed
        check(run, problem(131, 131, 64, torch.bfloat16), kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_queries", [1, 5, 67])
@pytest.mark.parametrize("learned", [True, False])
def test_decode_chunk(backend: str, num_queries: int, learned: bool):
    """Queries at the end of 130 keys."""
    kwargs = {"length": 150, "positions": torch.arange(130 - num_queries, 130, device=DEVICE)}
    run = flex_with_lse(backend, **kwargs)
    for dtype in HALF:
        check = assert_matches_eq11 if learned else assert_matches_eq11_with_gamma_fixed
        check(run, problem(num_queries, 130, 64, dtype), kwargs)


@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"])
@pytest.mark.parametrize("length", [29, 100])
def test_more_queries_than_keys_leaves_fully_masked_rows(backend: str, length: int):
    """The first 61 rows see no key: output 0, lse' = log M. At length 29 one of them (position 28) has no mass either."""
    kwargs = {"length": length, "positions": torch.arange(131, device=DEVICE)}
    run = flex_with_lse(backend, **kwargs)
    inputs = problem(131, 70, 64, torch.bfloat16)
    assert_matches_eq11(run, inputs, kwargs, with_lse_grad=True)
    out, lse = run(*inputs)
    assert lse is not None
    assert out[:, :, :61].abs().max() == 0
    assert torch.isneginf(lse[:, :, 28]).all() == (length == 29)
    assert torch.isfinite(lse).sum() == lse.numel() - (12 if length == 29 else 0)
