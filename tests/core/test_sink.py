"""A sink beside the mass of gamma (gpt-oss's learned ones, the paper's Table 3) against eq. 11 with one more pseudo column."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask
from torch.nn.attention.varlen import AuxRequest as VarlenAuxRequest

from sm_flex import flex_attention, headwise_gamma, log_mass, scaled_dot_product_attention, stablemask, varlen_attn
from sm_flex.epilogue.formula import real_share_and_lse
from sm_flex.epilogue.remask import epilogue
from sm_flex.mass.closed_form import log_mass_table
from sm_flex.testing import assert_matches_eq11, oracle
from sm_flex.testing.gradients import Attention, outputs_and_gradients
from tests.helpers.problems import documents, packed, qkv, unpacked

HEADS, LENGTH = 6, 29
CONSTANT = 1e-2  # a pseudo score that is the same in every column (Table 3)


def log_mass_of_constant(num_rows: int) -> Tensor:
    """log(N-1-p) + c, (1, S)."""
    return log_mass(torch.tensor(0.0).double(), torch.arange(num_rows), LENGTH) + CONSTANT


def constant_columns(num_rows: int) -> Tensor:
    """The log-sum-exp of pseudo scores c for i < j < N, column by column, (1, S)."""
    i, j = torch.arange(num_rows)[:, None], torch.arange(LENGTH)
    return torch.logsumexp(torch.where(j > i, torch.tensor(CONSTANT, dtype=torch.float64), -math.inf), dim=-1).unsqueeze(0)


# name: gamma and the sink as stablemask is given them, and as the oracle is, from a learned (H,) and the number of rows.
Case = tuple[Any, Any, Any]
MASSES: dict[str, Callable[[Tensor, int], Case]] = {
    "a fixed token": lambda s, n: (math.inf, 0.0, 0.0),
    "a constant": lambda s, n: (math.inf, log_mass_of_constant(n), constant_columns(n)),
    "one per head": lambda s, n: (math.inf, s, s),
    "beside gamma": lambda s, n: (headwise_gamma(HEADS).double(), s, s),
    "a table": lambda s, n: (0.0, s[:, None] * 2, s[:, None] * 2),
    "a table per batch": lambda s, n: (headwise_gamma(HEADS).double(), s.expand(2, -1)[..., None], s.expand(2, -1)[..., None]),
}


def a_sink() -> Tensor:
    return torch.linspace(-1.5, 2.0, HEADS, dtype=torch.float64)


def assert_matches(
    run: Attention, inputs: list[Tensor], name: str, num_rows: int, rows: Tensor, with_lse_grad: bool, **options: Any
) -> None:
    """run(q, k, v, gamma, s) is the oracle's; a sink that has one value per row has those of rows."""
    gamma, *_ = MASSES[name](a_sink(), num_rows)

    def oracle_kwargs(s: Tensor) -> dict[str, Any]:
        _, _, sink = MASSES[name](s, num_rows)
        return {"length": LENGTH, "sink": at_rows(sink, num_rows, rows), **options}

    assert_matches_eq11(
        run, [*inputs, torch.as_tensor(gamma, dtype=torch.float64), a_sink()], oracle_kwargs,
        constants=["gamma"], with_lse_grad=with_lse_grad, tolerance=1e-10,
    )  # fmt: skip


def at_rows(sink: Any, num_rows: int, rows: Tensor) -> Any:
    return sink[..., rows] if isinstance(sink, Tensor) and sink.shape[-1] == num_rows else sink


@pytest.mark.parametrize("name", MASSES)
@pytest.mark.parametrize("rows", [1, 23, LENGTH])
@pytest.mark.parametrize("backend", ["AUTO", "MATH"])
def test_flex(backend: str, rows: int, name: str):
    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None]:
        number_or_tensor, sink, _ = MASSES[name](s, rows)
        out, aux = flex_attention(
            q, k, v, score_mod=stablemask(number_or_tensor, length=LENGTH, sink=sink), enable_gqa=True,
            kernel_options={"BACKEND": backend}, return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        return out, aux.lse

    inputs = qkv(2, HEADS, 2, rows, rows, 7)
    assert_matches(run, inputs, name, rows, torch.arange(rows), with_lse_grad=True)
    grad_out, grad_lse = torch.ones(2, HEADS, rows, 7).double(), torch.ones(2, HEADS, rows).double()
    *_, grad = outputs_and_gradients(run, [*inputs, torch.zeros(()), a_sink()], grad_out, grad_lse)
    assert bool(grad.any()) == (name not in ("a fixed token", "a constant"))


@pytest.mark.parametrize("name", MASSES)
def test_sdpa_of_a_chunk(name: str):
    """Queries that are the last of their keys: their positions begin later, and a table has their rows."""
    positions = torch.arange(12, 23)

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, s: Tensor) -> tuple[Tensor, None]:
        number_or_tensor, sink, _ = MASSES[name](s, 23)
        mask = stablemask(number_or_tensor, length=LENGTH, positions=positions, sink=at_rows(sink, 23, positions))
        visible = torch.ones(11, 23, dtype=torch.bool)
        return scaled_dot_product_attention(q, k, v, visible, score_mod=mask, enable_gqa=True), None

    inputs = qkv(2, HEADS, 2, 11, 23, 7)
    assert_matches(run, inputs, name, 23, positions, with_lse_grad=False, positions=positions)


@pytest.mark.parametrize("name", [name for name in MASSES if name != "a table per batch"])
@pytest.mark.parametrize("window", [-1, 4])
def test_varlen(window: int, name: str):
    """A table goes by the position in the document, as gamma's mass."""
    cu, ids, positions = documents([5, 1, 17])

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        number_or_tensor, sink, _ = MASSES[name](s, 23)
        result = varlen_attn(
            packed(q), packed(k), packed(v), cu, cu, 17, 17, window_size=(window, 0), enable_gqa=True,
            score_mod=stablemask(number_or_tensor, length=LENGTH, sink=at_rows(sink, 23, positions)),
            return_aux=VarlenAuxRequest(lse=True),
        )  # fmt: skip
        assert isinstance(result, tuple)
        return unpacked(result[0]), result[1].unsqueeze(0)

    i = torch.arange(23)
    visible = ids.unsqueeze(1) == ids
    if window >= 0:
        visible = visible & (i.unsqueeze(1) - i <= window)
    inputs = qkv(1, HEADS, 2, 23, 23, 7)
    assert_matches(run, inputs, name, 23, positions, with_lse_grad=True, positions=positions, visible=visible)


def test_gamma_and_the_sink_are_learned_together():
    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, s: Tensor) -> tuple[Tensor, None]:
        return flex_attention(q, k, v, score_mod=stablemask(gamma, length=LENGTH, sink=s), enable_gqa=True), None

    inputs = [*qkv(2, HEADS, 2, 13, 13, 7), headwise_gamma(HEADS).double(), a_sink()]
    assert_matches_eq11(run, inputs, lambda s: {"length": LENGTH, "sink": s}, tolerance=1e-10)
    *_, d_gamma, d_sink = outputs_and_gradients(run, inputs, torch.ones(2, HEADS, 13, 7), None)
    assert d_sink.abs().min() > 0
    assert d_gamma.abs().min() > 0


def test_where_neither_has_mass_gradients_are_finite():
    """Row N-1 of gamma's mass is empty, and so may be a sink that is learned."""
    sink = torch.tensor([-math.inf, 0.0], requires_grad=True)
    gamma = torch.tensor([0.5, 0.5], requires_grad=True)
    q, k, v = [x.requires_grad_() for x in qkv(1, 2, 2, 9, 9, 4)]
    flex_attention(q, k, v, score_mod=stablemask(gamma, length=9, sink=sink)).square().sum().backward()  # pyright: ignore
    for x in (q, k, v, gamma, sink):
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
    assert sink.grad is not None
    assert sink.grad[0] == 0 != sink.grad[1]


def test_no_sink_is_the_same_to_the_bit():
    q, k, v = qkv(2, HEADS, 2, 13, 13, 8, torch.float32)
    without = stablemask(headwise_gamma(HEADS), length=LENGTH)
    masks = [without, *(stablemask(headwise_gamma(HEADS), length=LENGTH, sink=sink) for sink in (None, -math.inf))]
    outs = [flex_attention(q, k, v, score_mod=mask, enable_gqa=True) for mask in masks]
    assert torch.equal(outs[0], outs[1])  # pyright: ignore
    assert torch.equal(outs[0], outs[2])  # pyright: ignore


def test_a_sink_changed_in_place_is_seen():
    q, k, v = qkv(2, HEADS, 2, 13, 13, 8, torch.float32)
    sink = torch.zeros(HEADS)
    mask = stablemask(0.5, length=LENGTH, sink=sink)
    before = flex_attention(q, k, v, score_mod=mask, enable_gqa=True)
    sink.fill_(3.0)
    after = flex_attention(q, k, v, score_mod=mask, enable_gqa=True)
    other = flex_attention(q, k, v, score_mod=stablemask(0.5, length=LENGTH, sink=3.0), enable_gqa=True)
    assert not torch.equal(before, after)  # pyright: ignore
    assert torch.equal(after, other)  # pyright: ignore


def test_compiled_whole():
    sink = torch.nn.Parameter(a_sink().float())

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = stablemask(headwise_gamma(HEADS), length=LENGTH, sink=sink)
        return scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=mask, enable_gqa=True)

    results = []
    for fn in (step, torch.compile(step, fullgraph=True)):
        sink.grad = None
        torch.manual_seed(0)
        q, k, v = [x.requires_grad_() for x in qkv(2, HEADS, 2, 23, 23, 8, torch.float32)]
        out = fn(q, k, v)
        out.square().sum().backward()
        assert sink.grad is not None
        results.append([out.detach(), q.grad, k.grad, v.grad, sink.grad.clone()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_keeps_the_sink(copied: Callable[[Any], Any]):
    q, k, v = qkv(2, HEADS, 2, 13, 13, 8, torch.float32)
    mask = stablemask(0.5, length=LENGTH, sink=a_sink())
    outs = [flex_attention(q, k, v, score_mod=m, enable_gqa=True) for m in (mask, copied(mask))]
    assert torch.equal(outs[0], outs[1])  # pyright: ignore


def test_the_epilogue_takes_the_table_where_the_kernel_would_not_know_of_the_sink():
    """Every way into the epilogue with a Mass (torch's flex without a gradient, a paged cache) has the sink in it."""
    out, lse = torch.randn(2, HEADS, 5, 8), torch.randn(2, HEADS, 5)
    mask = stablemask(headwise_gamma(HEADS), length=LENGTH, sink=a_sink())
    mass = mask.mass(out.device, 5, 5, torch.float32)
    table = log_mass_table(headwise_gamma(HEADS), None, None, a_sink(), LENGTH, 5, torch.float32)
    share, expected = real_share_and_lse(lse, table)
    assert expected is not None
    new_out, new_lse = epilogue(out, lse, mass, in_place=False)
    torch.testing.assert_close(new_lse, expected)
    torch.testing.assert_close(new_out, out * share.unsqueeze(-1))
    without = log_mass_table(headwise_gamma(HEADS), None, None, None, LENGTH, 5, torch.float32)
    assert not torch.allclose(expected, torch.logaddexp(lse, without))


@pytest.mark.card("the compiler's code for CUDA")
@pytest.mark.gpu
@pytest.mark.parametrize("name", MASSES)
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu(compiled: bool, name: str):
    """Training and inference, by the library kernels and by torch's flex, against the plain formula in float64."""
    q, k, v = [x.cuda().bfloat16() for x in qkv(2, HEADS, 2, 23, 23, 64, torch.float32)]
    gamma, sink, oracle_sink = MASSES[name](a_sink(), 23)
    reference, _ = oracle(q.cpu(), k.cpu(), v.cpu(), gamma=gamma, length=LENGTH, sink=oracle_sink)
    gamma, sink = [x.float().cuda() if isinstance(x, Tensor) else x for x in (gamma, sink)]
    mask = stablemask(gamma, length=LENGTH, sink=sink)
    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 23, 23, device="cuda")
    for options in ({}, {"block_mask": block_mask}):

        def run(q: Tensor, options: dict[str, Any] = options) -> Tensor:
            return flex_attention(q, k, v, score_mod=mask, enable_gqa=True, **options)

        fn = torch.compile(run) if compiled else run
        for x in (q, q.clone().requires_grad_()):
            torch.testing.assert_close(fn(x).detach().cpu().double(), reference, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("make", "error", "why"),
    [
        (lambda: stablemask(0.5, sink=True), TypeError, "sink must be a number.*bool"),  # pyright: ignore
        (lambda: stablemask(0.5, sink="0"), TypeError, "sink must be a number.*str"),  # pyright: ignore
        (lambda: stablemask(0.5, sink=math.nan), ValueError, "sink must be a number below inf, got nan"),
        (lambda: stablemask(0.5, sink=math.inf), ValueError, "sink must be a number below inf, got inf"),
        (lambda: stablemask(0.5, sink=-(10**400)), ValueError, "sink must be a float64, or -inf, got an int of 401 digits"),
        (lambda: stablemask(0.5, sink=torch.zeros(3, dtype=torch.int64)), TypeError, "sink must be a floating tensor, got dtype"),
        (lambda: stablemask(0.5, sink=torch.zeros(1, 1, 1, 1)), ValueError, r"sink must be 0-d, \(H,\), .* got shape"),
        (lambda: stablemask(0.5, sink=torch.tensor([0.0, math.nan])), ValueError, "sink must be below inf"),
    ],
)
def test_refused_when_made(make: Callable[[], Any], error: type[Exception], why: str):
    with pytest.raises(error, match=why):
        make()


@pytest.mark.parametrize(
    ("sink", "why"),
    [
        (torch.zeros(3), r"sink must have one value for each of the 6 query heads, got 3"),
        (torch.zeros(6, 12), r"sink must be broadcastable to \(B, H, S\) = \(2, 6, 13\), got \(6, 12\)"),
        (torch.zeros(3, 6, 13), r"sink must be broadcastable to \(B, H, S\) = \(2, 6, 13\), got \(3, 6, 13\)"),
        (torch.zeros(6, device="meta"), r"sink must be on the device of query, cpu, got meta"),
    ],
)
def test_refused_by_the_call(sink: Tensor, why: str):
    q, k, v = qkv(2, HEADS, 2, 13, 13, 8, torch.float32)
    with pytest.raises(ValueError, match=why):
        flex_attention(q, k, v, score_mod=stablemask(0.5, length=LENGTH, sink=sink), enable_gqa=True)


def test_eq_8_alone_has_no_column_for_a_sink():
    with pytest.raises(ValueError, match=r"presoftmax .* sink"):
        stablemask(0.5, sink=0.0).presoftmax(*[torch.tensor(0.0)] * 5)


def test_the_largest_score_of_a_row_with_a_sink_is_refused():
    q, k, v = qkv(2, HEADS, 2, 13, 13, 8, torch.float32)
    mask = stablemask(0.5, length=LENGTH, sink=0.0)
    with pytest.raises(NotImplementedError, match=r"max_scores .* sink"):
        flex_attention(q, k, v, score_mod=mask, enable_gqa=True, return_aux=AuxRequest(max_scores=True))
