"""torch.compile on a GPU: the automatic engine, torch's flex, dynamic lengths, and how often a graph is captured."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, and_masks, create_block_mask
from torch.nn.attention.varlen import AuxRequest as VarlenAux

from sm_flex import flex_attention, scaled_dot_product_attention, stablemask, varlen_attn
from sm_flex.testing import assert_matches_eq11
from tests.helpers.gpu import DEVICE, assert_matches_eq11_with_gamma_fixed
from tests.helpers.problems import alibi, alibi_bias, documents, flex_with_lse, gamma_of, packed, qkv, unpacked

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("fresh_compiler"),
    # What torch's compiler says of itself, such as that TensorFloat32 is off.
    pytest.mark.filterwarnings("ignore::Warning:torch"),
]
BF16 = torch.bfloat16
COMPILED = "the compiler's code for CUDA"


def problem(rows: int, dim: int = 64, dtype: torch.dtype = BF16) -> list[Tensor]:
    return [*qkv(2, 6, 2, rows, rows, dim, dtype, DEVICE), gamma_of(6, dtype, DEVICE)]


@pytest.mark.card(COMPILED)
@pytest.mark.parametrize("backend", ["AUTO", "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"])
def test_engines_learned_and_through_lse(backend: str):
    run = torch.compile(flex_with_lse(backend, length=200), fullgraph=True)
    assert_matches_eq11(run, problem(139), {"length": 200}, with_lse_grad=True)


@pytest.mark.card(COMPILED)
def test_not_learned_with_positions():
    """The kernel that works log M out by itself, inside the graph; torch.compile sees a tensor gamma."""
    positions = torch.cat([torch.arange(58), torch.arange(81)]).to(DEVICE)
    kwargs = {"length": 200, "positions": positions}
    assert_matches_eq11_with_gamma_fixed(torch.compile(flex_with_lse("AUTO", **kwargs), fullgraph=True), problem(139), kwargs)


@pytest.mark.card(COMPILED)
def test_masked():
    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, attn_mask: Tensor) -> tuple[Tensor, None]:
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, score_mod=stablemask(gamma, length=80)), None

    attn_mask = (torch.rand(2, 1, 61, 61) > 0.4).to(DEVICE)
    for kernel in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        inputs = [*qkv(2, 4, 4, 61, 61, 64, BF16, DEVICE), gamma_of(4, BF16, DEVICE), attn_mask]
        with sdpa_kernel(kernel):
            assert_matches_eq11(torch.compile(run, fullgraph=True), inputs, lambda m: {"length": 80, "visible": m})
        torch._dynamo.reset()


@pytest.mark.card(COMPILED)
def test_varlen():
    lengths = [3, 0, 149, 1, 46]
    cu, ids, positions = documents(lengths, DEVICE)

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = varlen_attn(
            packed(q), packed(k), packed(v), cu, cu, 149, 149, window_size=(-1, 0), enable_gqa=True,
            return_aux=VarlenAux(lse=True), score_mod=stablemask(gamma, length=140),
        )  # fmt: skip
        return unpacked(out), lse.unsqueeze(0)

    inputs = [*qkv(1, 6, 2, 199, 199, 64, BF16, DEVICE), gamma_of(6, BF16, DEVICE)]
    visible = ids.unsqueeze(1) == ids
    kwargs = {"length": 140, "positions": positions, "visible": visible}
    assert_matches_eq11_with_gamma_fixed(torch.compile(run, fullgraph=True), inputs, kwargs)


def graphs(run: Callable[..., Tensor], inputs: list[list[Any]]) -> int:
    """How many graphs it takes to give, on each of the inputs, what eager gives."""
    before = counters["stats"]["unique_graphs"]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for tensors in inputs:
        expected, actual = run(*tensors), compiled(*tensors)
        torch.testing.assert_close(actual, expected)
        leaves = [x for x in tensors if isinstance(x, Tensor) and x.requires_grad]
        if leaves:
            grad_out = torch.randn_like(expected)
            actual_grads, grads = (torch.autograd.grad(out, leaves, grad_out) for out in (actual, expected))
            for a, b in zip(actual_grads, grads, strict=True):
                torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
    return counters["stats"]["unique_graphs"] - before


ROWS = (64, 100, 33, 257, 130)


@pytest.mark.usefixtures("plain_epilogue")
@pytest.mark.parametrize("backend", ["AUTO", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"])
def test_at_most_three_graphs_over_five_lengths(backend: str):
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=mask, kernel_options={"BACKEND": backend})

    mask = stablemask(gamma_of(4, BF16, DEVICE), length=600)
    inputs = [[x.requires_grad_() for x in qkv(2, 4, 4, n, n, 64, BF16, DEVICE)] for n in ROWS]
    assert graphs(run, inputs) <= 3


@pytest.mark.usefixtures("plain_epilogue")
def test_at_most_three_graphs_over_five_lengths_of_a_cache():
    def step(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        mask = stablemask(gamma, length=600, positions=positions)
        return flex_attention(q, k, v, score_mod=mask, enable_gqa=True)

    gamma = gamma_of(6, BF16, DEVICE)
    inputs = [[*qkv(2, 6, 2, 1, n, 64, BF16, DEVICE), torch.tensor([n - 1], device=DEVICE)] for n in ROWS]
    assert graphs(step, inputs) <= 3


@pytest.mark.card(COMPILED)
def test_every_dimension_dynamic():
    """dynamic=True asks it of heads and head dim too: the engine is still chosen while tracing."""
    compiled = torch.compile(flex_with_lse("AUTO", length=200), fullgraph=True, dynamic=True)
    for rows in (61, 139):
        assert_matches_eq11(compiled, problem(rows), {"length": 200})


@pytest.mark.usefixtures("plain_epilogue")
@pytest.mark.parametrize("heads", [None, 4])
def test_a_new_gamma_does_not_recompile(heads: int | None):
    def run(q: Tensor, mask: Any) -> Tensor:
        return flex_attention(q, q, q, score_mod=mask)

    q = torch.randn(2, 4, 61, 64, device=DEVICE, dtype=BF16)
    gammas = (0.5, 0.25, 0.0, 3.0)
    masks = [stablemask(gamma if heads is None else torch.full((heads,), gamma, device=DEVICE), length=64) for gamma in gammas]
    assert graphs(run, [[q, mask] for mask in masks]) == 1


@pytest.mark.card(COMPILED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flex_inner_score_mod(dtype: torch.dtype):
    bias = alibi_bias(6, 199).to(DEVICE)
    run = torch.compile(flex_with_lse("AUTO", length=240, score_mod=alibi), fullgraph=True)
    assert_matches_eq11(run, problem(199, dtype=dtype), {"length": 240, "bias": bias}, with_lse_grad=True)


@pytest.mark.card(COMPILED)
def test_flex_captured_tensor_gets_its_gradient():
    """A learned bias for each key of each head."""

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, table: Tensor) -> tuple[Tensor, Tensor | None]:
        def inner(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score + table[h, kv_idx]

        mask = stablemask(gamma, length=240, score_mod=inner)
        out, aux = flex_attention(q, k, v, score_mod=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
        return out, aux.lse

    inputs = [*problem(199), torch.randn(6, 199, device=DEVICE)]
    assert_matches_eq11(
        torch.compile(run, fullgraph=True),
        inputs,
        lambda table: {"length": 240, "bias": table.reshape(1, 6, 1, 199)},
        with_lse_grad=True,
    )


@pytest.mark.card(COMPILED)
@pytest.mark.parametrize("learned", [True, False])
def test_flex_block_mask_of_documents_and_window(learned: bool):
    _, ids, positions = documents([3, 149, 1, 46], DEVICE)

    def same_document(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ids[q_idx] == ids[kv_idx]

    def window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx - kv_idx <= 40

    block_mask = create_block_mask(and_masks(same_document, window), None, None, 199, 199, device=DEVICE)
    kwargs: dict[str, Any] = {"length": 160, "positions": positions}

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor | None]:
        out, aux = flex_attention(
            q, k, v, score_mod=stablemask(gamma, **kwargs), block_mask=block_mask, enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        return out, aux.lse

    i = torch.arange(199, device=DEVICE)
    visible = (ids.unsqueeze(1) == ids) & (i.unsqueeze(1) - i <= 40)
    check = assert_matches_eq11 if learned else assert_matches_eq11_with_gamma_fixed
    check(torch.compile(run, fullgraph=True), problem(199), {**kwargs, "visible": visible}, with_lse_grad=True)


@pytest.mark.card(COMPILED)
def test_flex_largest_score_of_a_row():
    """max_scores is the largest entry of the row of A_SM: real scores left of the diagonal, -j gamma right of it."""
    q, k, v, gamma = problem(199)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = stablemask(gamma, length=150)
        aux_request = AuxRequest(lse=True, max_scores=True)
        out, aux = flex_attention(q, k, v, score_mod=mask, enable_gqa=True, return_aux=aux_request)
        assert aux.lse is not None
        assert aux.max_scores is not None
        return out, aux.lse, aux.max_scores

    _, lse, largest = torch.compile(run, fullgraph=True)(q, k, v)
    i = torch.arange(199, device=DEVICE).unsqueeze(1)
    real = q.double() @ k.double().repeat_interleave(3, 1).mT / 8
    real = real.masked_fill(i.mT > i, -torch.inf).amax(-1)
    # Row p: the next pseudo column is p + 1, which the row p = N - 1 has not; beyond N the one score is tau.
    pseudo = -(i.mT + 1) * gamma.double().unsqueeze(1)
    pseudo[:, 149] = -torch.inf
    torch.testing.assert_close(largest.double(), torch.maximum(real, pseudo), atol=1e-3, rtol=1e-4)
    assert (pseudo > real).any()
    assert (lse >= largest - 1e-3).all()
