"""A sink's value on every CUDA engine: out, lse and all gradients, and the gradient through lse."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask
from torch.nn.attention.varlen import AuxRequest as VarlenAuxRequest

from sm_flex import flex_attention, remask, scaled_dot_product_attention, stablemask, varlen_attn
from sm_flex.testing import assert_matches_eq11, oracle
from sm_flex.testing.gradients import Attention
from tests.helpers.gpu import DEVICE, HALF, name_of
from tests.helpers.problems import documents, gamma_of, packed, qkv, unpacked

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_tile")]
HEADS, KV_HEADS, LENGTH = 6, 2, 200
KERNELS = [
    *((backend, dtype) for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION") for dtype in HALF),
    *((backend, dtype) for backend in ("EFFICIENT_ATTENTION", "MATH") for dtype in (*HALF, torch.float32)),
    ("MATH", torch.float64),
]


def a_sink(dtype: torch.dtype) -> Tensor:
    """-inf in one head, a large share in others."""
    sink = torch.linspace(-2.0, 6.0, HEADS, dtype=torch.float64)
    sink[2] = -math.inf
    return sink.to(DEVICE, torch.promote_types(dtype, torch.float32))


def a_value(heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(heads, dim, dtype=torch.float64).to(DEVICE, torch.promote_types(dtype, torch.float32))


def problem(rows: int, keys: int, dim: int, dtype: torch.dtype, value_heads: int, **options: Any) -> list[Tensor]:
    """q, k, v, gamma, sink, value."""
    inputs = [*qkv(2, HEADS, KV_HEADS, rows, keys, dim, dtype, DEVICE, **options), gamma_of(HEADS, dtype, DEVICE)]
    return [*inputs, a_sink(dtype), a_value(value_heads, inputs[2].shape[-1], dtype)]


def oracle_kwargs(**options: Any) -> Any:
    return lambda sink, value: {"length": LENGTH, "sink": sink, "sink_value": value, **options}


def flex(backend: str, **options: Any) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, sink: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        out, aux = flex_attention(
            q, k, v, score_mod=stablemask(gamma, length=LENGTH, sink=sink, sink_value=value, **options), enable_gqa=True,
            kernel_options={"BACKEND": backend}, return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        return out, aux.lse

    return run


@pytest.mark.parametrize(("backend", "dtype"), KERNELS, ids=name_of)
@pytest.mark.parametrize("value_heads", [HEADS, KV_HEADS])
@pytest.mark.parametrize("with_lse_grad", [False, True])
def test_square(with_lse_grad: bool, value_heads: int, backend: str, dtype: torch.dtype):
    for rows, dim in ((131, 64), (129, 40)):
        inputs = problem(rows, rows, dim, dtype, value_heads)
        assert_matches_eq11(flex(backend), inputs, oracle_kwargs(), with_lse_grad=with_lse_grad)


@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"])
def test_more_queries_than_keys(backend: str):
    """Rows that see nothing get what is left to them of the value, whatever the kernel wrote there."""
    positions = torch.arange(131, device=DEVICE)
    inputs = problem(131, 70, 64, torch.bfloat16, HEADS)
    assert_matches_eq11(flex(backend, positions=positions), inputs, oracle_kwargs(positions=positions), with_lse_grad=True)
    q, k, v, _, sink, value = inputs
    mask = stablemask(math.inf, length=LENGTH, positions=positions, sink=sink, sink_value=value)
    out = flex_attention(q, k, v, score_mod=mask, enable_gqa=True, kernel_options={"BACKEND": backend})
    expected = value.bfloat16().masked_fill(torch.isneginf(sink).unsqueeze(-1), 0.0)
    torch.testing.assert_close(out[:, :, :61], expected.unsqueeze(1).expand(2, -1, 61, -1))  # pyright: ignore


@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"])
@pytest.mark.parametrize("num_queries", [1, 67])
def test_decode_chunk(num_queries: int, backend: str):
    kwargs = {"positions": torch.arange(130 - num_queries, 130, device=DEVICE)}
    inputs = problem(num_queries, 130, 64, torch.bfloat16, KV_HEADS)
    assert_matches_eq11(flex(backend, **kwargs), inputs, oracle_kwargs(**kwargs))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=name_of)
@pytest.mark.parametrize("v_dim", [64, 48])
def test_sdpa_with_a_mask(v_dim: int, dtype: torch.dtype):
    """torch's own choice of kernel; a boolean mask that leaves a row without a key."""
    visible = torch.rand(2, 1, 67, 67, device=DEVICE) > 0.5
    visible[:, :, 5] = False

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, sink: Tensor, value: Tensor) -> tuple[Tensor, None]:
        mask = stablemask(gamma, length=LENGTH, sink=sink, sink_value=value)
        return scaled_dot_product_attention(q, k, v, visible, score_mod=mask, enable_gqa=True), None

    inputs = problem(67, 67, 64, dtype, HEADS, v_dim=v_dim)
    assert_matches_eq11(run, inputs, oracle_kwargs(visible=visible))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=name_of)
@pytest.mark.parametrize("window", [-1, 5])
def test_varlen(window: int, dtype: torch.dtype):
    cu, ids, positions = documents([3, 0, 49, 1, 15], DEVICE)
    i = torch.arange(68, device=DEVICE)
    visible = ids.unsqueeze(1) == ids
    if window >= 0:
        visible = visible & (i.unsqueeze(1) - i <= window)

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, sink: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        result = varlen_attn(
            packed(q), packed(k), packed(v), cu, cu, 49, 49, window_size=(window, 0), enable_gqa=True,
            return_aux=VarlenAuxRequest(lse=True), score_mod=stablemask(gamma, length=LENGTH, sink=sink, sink_value=value),
        )  # fmt: skip
        assert isinstance(result, tuple)
        return unpacked(result[0]), result[1].unsqueeze(0)

    for value_heads in (HEADS, KV_HEADS):
        inputs = [*qkv(1, HEADS, KV_HEADS, 68, 68, 64, dtype, DEVICE), gamma_of(HEADS, dtype, DEVICE)]
        inputs += [a_sink(dtype), a_value(value_heads, 64, dtype)]
        options: Any = oracle_kwargs(positions=positions, visible=visible)
        assert_matches_eq11(run, inputs, options, with_lse_grad=True)


@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"])
@pytest.mark.parametrize("learned", [False, True])
def test_inference_is_what_training_computes(learned: bool, backend: str):
    """In place and without autograd, to the last bit; q, k and v alone may be learned too."""
    q, k, v, gamma, sink, value = problem(131, 131, 64, torch.bfloat16, HEADS)
    mask = stablemask(gamma, length=LENGTH, sink=sink, sink_value=value)
    options: Any = {"score_mod": mask, "enable_gqa": True, "kernel_options": {"BACKEND": backend}}
    with torch.no_grad():
        expected = flex_attention(q, k, v, **options)
    for x in (sink, value) if learned else (q,):
        x.requires_grad_()
    assert torch.equal(flex_attention(q, k, v, **options), expected)  # pyright: ignore


def test_remask():
    q, k, v, gamma, sink, value = problem(67, 67, 64, torch.float32, HEADS)
    causal, lse = [x.float() for x in oracle(q, k, v, gamma=math.inf)]
    gamma = torch.full_like(gamma, math.inf)
    out, new_lse = remask(causal, lse, torch.full((1,), -math.inf, device=DEVICE), sink=sink, sink_value=value)
    expected, expected_lse = oracle(q, k, v, gamma=gamma, length=LENGTH, sink=sink, sink_value=value)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new_lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.card("the compiler's code for CUDA")
@pytest.mark.parametrize("compiled", [False, True])
def test_torchs_flex(compiled: bool):
    """A block_mask, which goes to torch's flex kernels: the epilogue by autograd, or in place without a gradient."""
    q, k, v, gamma, sink, value = problem(131, 131, 64, torch.bfloat16, HEADS)
    block_mask = create_block_mask(lambda b, h, i, j: i - j < 50, None, None, 131, 131, device=DEVICE)
    i = torch.arange(131, device=DEVICE)

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, sink: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        mask = stablemask(gamma, length=LENGTH, sink=sink, sink_value=value)
        out, aux = flex_attention(
            q, k, v, score_mod=mask, block_mask=block_mask, enable_gqa=True, return_aux=AuxRequest(lse=True)
        )
        return out, aux.lse

    fn = torch.compile(run, fullgraph=True) if compiled else run
    options = oracle_kwargs(visible=i.unsqueeze(1) - i < 50)
    assert_matches_eq11(fn, [q, k, v, gamma, sink, value], options, with_lse_grad=True)
    with torch.no_grad():
        for a, b in zip(fn(q, k, v, gamma, sink, value), run(q, k, v, gamma, sink, value), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
