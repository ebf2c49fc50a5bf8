"""Faults that were found without a GPU, each where only a GPU shows that it is mended."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sm_flex import flex_attention, scaled_dot_product_attention, stablemask, varlen_attn
from sm_flex.mass.table import Mass
from sm_flex.testing import assert_matches_eq11
from tests.helpers.gpu import DEVICE
from tests.helpers.problems import documents, gamma_of, packed, qkv

pytestmark = [
    pytest.mark.gpu,
    # What torch says of its own prototypes (synchronisation debugging) and of its compiler.
    pytest.mark.filterwarnings("ignore::Warning:torch"),
]
BF16 = torch.bfloat16
BACKENDS = ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"]


def leaves(rows: int) -> list[Tensor]:
    return [x.requires_grad_() for x in qkv(2, 6, 6, rows, rows, 64, BF16, DEVICE)]


@pytest.mark.parametrize("backend", [*BACKENDS, "varlen"])
def test_every_dimension_dynamic_on_an_engine_asked_for_by_name(backend: str, fresh_compiler: None):
    """The compile did not end where the head dim was a symbol."""
    gamma = gamma_of(6, BF16, DEVICE)

    def run(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        mask = stablemask(gamma, length=200)
        if backend == "varlen":
            args = (packed(q[:1]), packed(k[:1]), packed(v[:1]), cu, cu, q.shape[2], q.shape[2])
            return varlen_attn(*args, window_size=(-1, 0), score_mod=mask)  # pyright: ignore[reportReturnType]
        return flex_attention(q, k, v, score_mod=mask, kernel_options={"BACKEND": backend})  # pyright: ignore

    compiled: Any = torch.compile(run, dynamic=True, fullgraph=True)
    for rows in (131, 66):
        inputs, cu = leaves(rows), documents([rows // 2, rows - rows // 2], DEVICE)[0]
        q, k, v = inputs
        expected, actual = run(q, k, v, cu), compiled(q, k, v, cu)
        torch.testing.assert_close(actual, expected, atol=2**-7, rtol=2**-7)
        grad = torch.randn_like(expected)
        for a, b in zip(*(torch.autograd.grad(x, inputs, grad) for x in (actual, expected)), strict=True):
            torch.testing.assert_close(a, b, atol=2**-5, rtol=2**-5)


def number_inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = stablemask(0.05, length=200, sink=-1.0)
    return flex_attention(q, k, v, score_mod=mask, kernel_options={"BACKEND": "FLASH_ATTENTION"})  # pyright: ignore


@pytest.mark.card("what synchronises")
def test_a_number_made_a_mask_in_the_call_waits_for_nothing():
    inputs = leaves(131)
    grad_out = torch.randn_like(number_inside(*inputs))
    for _ in range(2):
        torch.autograd.grad(number_inside(*inputs), inputs, grad_out)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(number_inside(*inputs), inputs, grad_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.card("CUDA graphs")
def test_a_number_made_a_mask_in_the_call_is_recorded_by_a_cuda_graph():
    inputs = [x.detach() for x in leaves(131)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            number_inside(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = number_inside(*inputs)
    for x in inputs:
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out, number_inside(*inputs))


@pytest.mark.card("torch's own function takes other ops on a CPU")
@pytest.mark.parametrize("plain_first", [True, False])
def test_masked_cudnn_beside_plain_masked_attention(plain_first: bool):
    """cuDNN keeps its graphs by the shape of a call: out must lie as in torch's own, or one of the two gets the other's."""
    attn_mask = torch.rand(2, 1, 131, 131, device=DEVICE) > 0.3
    attn_mask[..., 0] = True
    visible = attn_mask & torch.ones(131, 131, dtype=torch.bool, device=DEVICE).tril()
    inputs = leaves(131)
    grad_out = torch.randn(2, 6, 131, 64, device=DEVICE, dtype=BF16)

    def plain() -> tuple[Tensor, ...]:
        out = F.scaled_dot_product_attention(*inputs, attn_mask=visible)
        return torch.autograd.grad(out, inputs, grad_out)

    def ours(*args: Tensor) -> tuple[Tensor, None]:
        *tensors, gamma = args
        mask = stablemask(gamma, length=200)
        return scaled_dot_product_attention(*tensors, attn_mask=attn_mask, score_mod=mask), None

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        if plain_first:
            plain()
        problem = [*(x.detach() for x in inputs), gamma_of(6, BF16, DEVICE)]
        assert_matches_eq11(ours, problem, {"length": 200, "visible": attn_mask})
        gradients = plain()
    wide = [x.detach().double().requires_grad_() for x in inputs]
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.autograd.grad(F.scaled_dot_product_attention(*wide, attn_mask=visible), wide, grad_out.double())
    for actual, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual.double(), reference, atol=2**-5, rtol=2**-5)


@pytest.mark.card("a launch of 65,536 tiles, which the interpreter would run one by one")
def test_rows_beyond_what_the_second_dimension_of_a_grid_holds():
    """2^20 rows at head_dim 256 are 65,536 tiles, one more than CUDA takes there."""
    pytest.importorskip("triton", reason="this torch has no Triton (a CPU build)")
    from sm_flex.epilogue.kernel import launch

    rows = 2**20
    out = torch.ones(1, 1, rows, 256, device=DEVICE, dtype=BF16)
    lse = torch.zeros(1, 1, rows, device=DEVICE)
    new_out, new_lse = launch(out, lse, Mass(torch.zeros(1, rows, device=DEVICE)), in_place=True)
    assert (new_out == 0.5).all()
    torch.testing.assert_close(new_lse, torch.full_like(lse, 2.0).log())


@pytest.mark.card("the bounds of documents on a CPU are checked")
def test_rows_after_the_last_document_leave_the_gradient_of_gamma_alone():
    cu = torch.tensor([0, 60, 100], dtype=torch.int32, device=DEVICE)

    def gradients(rows: int) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        q, k, v = [packed(x[:1])[:rows].detach().requires_grad_() for x in leaves(131)]
        gamma = gamma_of(6, BF16, DEVICE).requires_grad_()
        # What the kernel's buffers hold where it writes nothing is what was freed before.
        filled = [torch.full_like(q, torch.nan), torch.full((6, rows), torch.nan, device=DEVICE)]
        del filled
        options: Any = {"window_size": (-1, 0), "score_mod": stablemask(gamma, length=200)}
        out = varlen_attn(q, k, v, cu, cu, 60, 60, **options)
        return torch.autograd.grad(out[:100].float().cos().sum(), (gamma, v))  # pyright: ignore

    (d_gamma, dv), (expected, expected_dv) = gradients(131), gradients(100)
    torch.testing.assert_close(d_gamma, expected)
    torch.testing.assert_close(dv[:100], expected_dv)
