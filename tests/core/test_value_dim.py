"""A value whose head dim is not the query's, as in latent attention: on the CPU, and by the shapes of CUDA's varlen op."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.attention.varlen import AuxRequest as VarlenAux

from benchmarks.fuzz.entry_points import CPU_PATHS
from sm_flex import flex_attention, stablemask, varlen_attn
from sm_flex.engines import Call, Need, varlen
from sm_flex.engines.choose import choose
from sm_flex.testing import assert_matches_eq11, check_attention
from sm_flex.testing.contract import Attention
from tests.helpers.problems import DTYPES, documents, flex_with_lse, gamma_of, packed, qkv, unpacked

KERNELS = ["flex_attention, cpu", "scaled_dot_product_attention, cpu, boolean mask", "varlen_attn, varlen_cpu"]
MORE = 3  # columns of a value that is wider than the query


def in_two_halves(fn: Attention) -> Attention:
    """fn with each half of the value's columns, side by side: a value narrower than the query wherever D > 1."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, sink: Any = None, sink_value: Any = None, **options: Any) -> Any:
        options = options if sink is None else {**options, "sink": sink}
        halves = [v.chunk(2, dim=-1)] if sink_value is None else [v.chunk(2, dim=-1), sink_value.chunk(2, dim=-1)]
        each = [dict(zip(("v", "sink_value"), half, strict=False)) for half in zip(*halves, strict=True)]
        results: list[Any] = [fn(q, k, **half, **options) for half in each]
        if isinstance(results[0], Tensor):
            return torch.cat(results, dim=-1)
        return torch.cat([out for out, _ in results], dim=-1), results[-1][1]

    return attend


def with_more_columns(fn: Attention) -> Attention:
    """fn with a value that is wider than the query, cut to the query's width again."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, sink: Any = None, sink_value: Any = None, **options: Any) -> Any:
        options = options if sink is None else {**options, "sink": sink}
        if sink_value is not None:
            options["sink_value"] = torch.cat([sink_value, sink_value[:, :1].expand(-1, MORE)], dim=-1)
        result = fn(q, k, torch.cat([v, v.flip(-2)[..., :1].expand(*v.shape[:-1], MORE)], dim=-1), **options)
        if isinstance(result, Tensor):
            return result[..., :-MORE]
        return result[0][..., :-MORE], result[1]

    return attend


@pytest.mark.parametrize("changed", [in_two_halves, with_more_columns])
@pytest.mark.parametrize("path", KERNELS)
def test_every_law_holds(path: str, changed: Callable[[Attention], Attention]):
    examples = max(1, settings.default.max_examples // 5)  # pyright: ignore
    check_attention(changed(CPU_PATHS[path]), dtype=torch.float64, max_examples=examples)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(24, 16), (8, 19)])
def test_flex_is_eq_11(dims: tuple[int, int], dtype: torch.dtype):
    """The kernel takes what the dense engine took: the scale follows the query's own head dim."""
    dim, v_dim = dims
    q, k, v = qkv(2, 4, 2, 37, 37, dim, dtype, v_dim=v_dim)
    assert choose(Need(q, k, v)) == "cpu"
    for with_lse_grad in (False, True):
        inputs = [q, k, v, gamma_of(4, dtype)]
        assert_matches_eq11(flex_with_lse(length=40), inputs, {"length": 40}, with_lse_grad=with_lse_grad)


def test_few_queries_do_not_copy_a_cache():
    """Columns for all keys cost more than the attention of a decode step, unless dense would copy keys and values too."""
    for queries, dtype, v_dim, engine in (
        (1, torch.float32, 5, "dense"), (31, torch.float64, 9, "dense"), (32, torch.float32, 5, "cpu"),
        (1, torch.bfloat16, 5, "cpu"), (1, torch.float32, 8, "cpu"),
    ):  # fmt: skip
        q, k, v = qkv(1, 2, 2, queries, 40, 8, dtype, v_dim=v_dim)
        assert choose(Need(q, k, v)) == engine
        assert choose(Need(q, k, v, backend="FLASH_ATTENTION")) == "cpu"


@pytest.mark.parametrize("dims", [(24, 16), (8, 19)])
@pytest.mark.parametrize("window", [-1, 5])
def test_varlen_is_eq_11(dims: tuple[int, int], window: int):
    dim, v_dim = dims
    cu, ids, positions = documents([3, 20, 14])
    i = torch.arange(37)
    visible = ids.unsqueeze(1) == ids
    if window >= 0:
        visible = visible & (i.unsqueeze(1) - i <= window)

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = varlen_attn(
            packed(q), packed(k), packed(v), cu, cu, 20, 20, window_size=(window, 0), enable_gqa=True,
            return_aux=VarlenAux(lse=True), score_mod=stablemask(gamma, length=40),
        )  # fmt: skip
        return unpacked(out), lse.unsqueeze(0)

    inputs = [*qkv(1, 4, 2, 37, 37, dim, v_dim=v_dim), gamma_of(4, torch.float64)]
    oracle_kwargs = {"length": 40, "positions": positions, "visible": visible}
    assert_matches_eq11(run, inputs, oracle_kwargs, with_lse_grad=window == 5)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_in_one_graph():
    cu = torch.tensor([0, 5, 16]).int()

    def both(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
        mask = stablemask(gamma, length=20)
        out, aux = flex_attention(q, k, v, score_mod=mask, return_aux=AuxRequest(lse=True))
        q, k, v = [x[0].transpose(0, 1) for x in (q, k, v)]
        packed_out = varlen_attn(q, k, v, cu, cu, 11, 11, window_size=(-1, 0), score_mod=mask)
        loss = out.square().sum() + packed_out.square().sum() + aux.lse.sum()  # pyright: ignore
        return out, packed_out, loss

    inputs = [*qkv(1, 2, 2, 16, 16, 8, v_dim=5), gamma_of(2, torch.float64)]
    results = []
    for fn in (both, torch.compile(both, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        *outs, loss = fn(*leaves)
        results.append([*outs, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build of torch knows no CUDA device, not even a fake one")
@pytest.mark.parametrize("dims", [(192, 128), (60, 90)])
def test_varlen_on_cuda_gives_the_op_one_head_dim(dims: tuple[int, int]):
    """FlashAttention 2 wants one: what the op is given has it, and what comes back is as wide as it should be."""
    dim, v_dim = dims
    with FakeTensorMode(), torch.no_grad():
        q, k, v = [
            torch.empty(37, heads, d, device="cuda", dtype=torch.bfloat16) for heads, d in ((6, dim), (3, dim), (3, v_dim))
        ]
        cu = torch.empty(3, device="cuda", dtype=torch.int32)
        assert choose(Need(q, k, v, packed=True)) == "varlen"
        call = Call(q, k, v, None, cu, cu, True, 0.1, max_q=20, max_k=20)
        out, lse, state = varlen.forward(call)
        assert out.shape == (1, 6, 37, v_dim)
        assert lse.shape == (1, 6, 37)
        grads = varlen.backward(call, torch.empty_like(out), out, lse, state, False)
        assert [None if grad is None else grad.shape for grad in grads] == [q.shape, k.shape, v.shape, None]
