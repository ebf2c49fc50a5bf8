"""A sink beside the mass of gamma (gpt-oss's learned ones, the paper's Table 3) against eq. 11 with those pseudo scores."""

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
from tests.helpers.problems import qkv

HEADS, LENGTH = 6, 29


def eq_11(
    q: Tensor, k: Tensor, v: Tensor, pseudo: Tensor, positions: Tensor | None = None, window: int = -1
) -> tuple[Tensor, Tensor]:
    """softmax over the real scores and the pseudo scores (B|1, H|1, S, any number), whose columns have no value; and its lse."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    rows, keys = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2], torch.arange(k.shape[2])
    seen = (keys <= rows) & ((rows - keys <= window) if window >= 0 else torch.tensor(True))
    real = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -math.inf)
    row = torch.cat([real, pseudo.expand(*q.shape[:3], pseudo.shape[-1])], dim=-1)
    return torch.softmax(row, dim=-1)[..., : k.shape[2]] @ v, torch.logsumexp(row, dim=-1)


def pseudo_scores(gamma: Tensor | None, constant: float | None, sink: Tensor | None, num_rows: int) -> Tensor:
    """One column for each pseudo score: -j gamma or a constant for i < j < N, and the sink (H,) in a column of its own."""
    i, j = torch.arange(num_rows)[:, None], torch.arange(LENGTH)
    columns = []
    if gamma is not None:
        columns.append(torch.where(j > i, -j * gamma[:, None, None], -math.inf))
    if constant is not None:
        columns.append(torch.where(j > i, torch.tensor(constant, dtype=torch.float64), -math.inf).expand(HEADS, -1, -1))
    if sink is not None:
        columns.append(sink.reshape(-1, 1, 1).expand(HEADS, num_rows, 1))
    return torch.cat(columns, dim=-1).unsqueeze(0)


def table_of(constant: float, num_rows: int) -> Tensor:
    """log M of pseudo scores that are all one constant: log(N-1-p) + c."""
    return log_mass(torch.tensor(0.0).double(), torch.arange(num_rows), LENGTH) + constant


def rates() -> Tensor:
    return headwise_gamma(HEADS).double()


# name: (the mask's arguments, the pseudo scores that they stand for), given the learned sink and the number of rows
MASSES: dict[str, tuple[Callable[[Tensor, int], tuple[Any, Any]], Callable[[Tensor, int], Tensor]]] = {
    "a fixed token": (lambda s, n: (math.inf, 0.0), lambda s, n: pseudo_scores(None, None, torch.zeros(1).double(), n)),
    "a constant": (lambda s, n: (math.inf, table_of(1e-2, n)), lambda s, n: pseudo_scores(None, 1e-2, None, n)),
    "one a head": (lambda s, n: (math.inf, s), lambda s, n: pseudo_scores(None, None, s, n)),
    "beside gamma": (lambda s, n: (rates(), s), lambda s, n: pseudo_scores(rates(), None, s, n)),
    "a row": (lambda s, n: (0.0, s[:, None] * 2), lambda s, n: pseudo_scores(torch.zeros(HEADS).double(), None, 2 * s, n)),
    "a batch": (lambda s, n: (rates(), s.expand(2, -1)[..., None]), lambda s, n: pseudo_scores(rates(), None, s, n)),
}


def answers(fn: Callable[..., tuple[Tensor, Tensor | None]], inputs: list[Tensor]) -> list[Tensor]:
    """out, lse and the gradient of q, k, v and the sink, of a loss that reaches out and lse."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out, lse = fn(*leaves)
    generator = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum()
    if lse is not None:
        loss = loss + (lse * torch.randn(lse.shape, generator=generator, dtype=lse.dtype)).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    return [out.detach(), *([] if lse is None else [lse.detach()]), *found]


def agree(
    ours: Callable[..., tuple[Tensor, Tensor | None]],
    reference: Callable[..., tuple[Tensor, Tensor | None]],
    inputs: list[Tensor],
) -> list[Tensor]:
    actual = answers(ours, inputs)
    torch.testing.assert_close(actual, answers(reference, inputs), rtol=0, atol=1e-10)
    return actual


def a_sink() -> Tensor:
    return torch.linspace(-1.5, 2.0, HEADS, dtype=torch.float64)


@pytest.mark.parametrize("name", MASSES)
@pytest.mark.parametrize("rows", [1, 23, LENGTH])
@pytest.mark.parametrize("backend", ["AUTO", "MATH"])
def test_flex(backend: str, rows: int, name: str):
    arguments, pseudo = MASSES[name]

    def run(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        gamma, sink = arguments(s, rows)
        out, aux = flex_attention(
            q, k, v, score_mod=stablemask(gamma, length=LENGTH, sink=sink), enable_gqa=True,
            kernel_options={"BACKEND": backend}, return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        assert aux.lse is not None
        return out, aux.lse

    inputs = [*qkv(2, HEADS, 2, rows, rows, 7), a_sink()]
    *_, grad = agree(run, lambda q, k, v, s: eq_11(q, k, v, pseudo(s, rows)), inputs)
    assert bool(grad.any()) == (name not in ("a fixed token", "a constant"))


@pytest.mark.parametrize("name", MASSES)
def test_sdpa_of_a_chunk(name: str):
    """Queries that are the last of their keys: their positions begin later, and a table has their rows."""
    arguments, pseudo = MASSES[name]
    positions = torch.arange(12, 23)

    def run(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, None]:
        gamma, sink = arguments(s, 23)
        if isinstance(sink, Tensor) and sink.shape[-1] == 23:
            sink = sink[..., 12:]
        mask = stablemask(gamma, length=LENGTH, positions=positions, sink=sink)
        visible = torch.ones(11, 23, dtype=torch.bool)
        return scaled_dot_product_attention(q, k, v, visible, score_mod=mask, enable_gqa=True), None

    def reference(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, None]:
        return eq_11(q, k, v, pseudo(s, 23)[:, :, 12:])[0], None

    agree(run, reference, [*qkv(2, HEADS, 2, 11, 23, 7), a_sink()])


@pytest.mark.parametrize("name", [name for name in MASSES if name != "a batch"])
@pytest.mark.parametrize("window", [-1, 4])
def test_varlen(window: int, name: str):
    arguments, pseudo = MASSES[name]
    lengths = (5, 1, 17)
    total, cu = sum(lengths), torch.tensor([0, 5, 6, 23], dtype=torch.int32)

    def run(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        gamma, sink = arguments(s, total)
        if isinstance(sink, Tensor) and sink.shape[-1] == total:  # by the position in the document, as gamma's mass
            sink = torch.cat([sink[..., :n] for n in lengths], dim=-1)
        result = varlen_attn(
            q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1),
            cu, cu, 17, 17, window_size=(window, 0), enable_gqa=True,
            score_mod=stablemask(gamma, length=LENGTH, sink=sink), return_aux=VarlenAuxRequest(lse=True),
        )  # fmt: skip
        assert isinstance(result, tuple)
        return result

    def reference(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), lengths, strict=True)
        outs, lses = zip(*[eq_11(q, k, v, pseudo(s, n), window=window) for q, k, v, n in parts], strict=True)
        return torch.cat(outs, dim=2)[0].transpose(0, 1), torch.cat(lses, dim=2)[0]

    agree(run, reference, [*qkv(1, HEADS, 2, total, total, 7), a_sink()])


def test_gamma_and_the_sink_are_learned_together():
    def run(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor) -> tuple[Tensor, None]:
        return flex_attention(q, k, v, score_mod=stablemask(g, length=LENGTH, sink=s), enable_gqa=True), None

    def reference(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor) -> tuple[Tensor, None]:
        return eq_11(q, k, v, pseudo_scores(g, None, s, 13))[0], None

    *_, ds, dg = agree(run, reference, [*qkv(2, HEADS, 2, 13, 13, 7), a_sink(), rates()])
    assert ds.abs().min() > 0
    assert dg.abs().min() > 0


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


@pytest.mark.gpu
@pytest.mark.parametrize("name", MASSES)
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu(compiled: bool, name: str):
    """Training and inference, by the library kernels and by torch's flex, against the plain formula in float64."""
    arguments, pseudo = MASSES[name]
    q, k, v = [x.cuda().bfloat16() for x in qkv(2, HEADS, 2, 23, 23, 64, torch.float32)]
    gamma, sink = [x.float().cuda() if isinstance(x, Tensor) else x for x in arguments(a_sink(), 23)]
    mask = stablemask(gamma, length=LENGTH, sink=sink)
    reference, _ = eq_11(q.cpu().double(), k.cpu().double(), v.cpu().double(), pseudo(a_sink(), 23))
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
