"""A sink's value under torch.compile, in checkpoints and in export, and what it costs: nothing where there is none."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import AuxRequest
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sm_flex import flex_attention, headwise_gamma, remask, scaled_dot_product_attention, stablemask, varlen_attn
from tests.helpers.problems import leaves
from tests.helpers.watching import Operations
from tests.runtime.test_checkpoint import ATTENTION, save_attention
from tests.runtime.test_compile import compare
from tests.runtime.test_cost import operations

pytestmark = pytest.mark.usefixtures("fresh_compiler")
HEADS, KV_HEADS, LENGTH = 4, 2, 600
GAMMA = headwise_gamma(HEADS)


def learned(value_heads: int = HEADS) -> list[Tensor]:
    return [torch.randn(HEADS).requires_grad_(), torch.randn(value_heads, 16).requires_grad_()]


def rows(length: int, *extra: Tensor) -> list[Tensor]:
    return [*leaves(2, HEADS, length, 16), *(extra or learned())]


def flex(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    mask = stablemask(GAMMA, length=LENGTH, sink=sink, sink_value=value)
    out, aux = flex_attention(q, k, v, score_mod=mask, return_aux=AuxRequest(lse=True))
    return out, aux.lse  # pyright: ignore[reportReturnType]


def grouped(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, value: Tensor) -> Tensor:
    mask = stablemask(GAMMA, length=LENGTH, sink=sink, sink_value=value)
    return scaled_dot_product_attention(q, k[:, ::2], v[:, ::2], is_causal=True, score_mod=mask, enable_gqa=True)


def inner(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, value: Tensor) -> Tensor:
    mask = stablemask(GAMMA, length=LENGTH, sink=sink, sink_value=value, score_mod=lambda s, b, h, i, j: s - (i - j) * 0.1)
    return flex_attention(q, k, v, score_mod=mask)  # pyright: ignore[reportReturnType]


def alone(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, value: Tensor) -> Tensor:
    return remask(q, k.sum(-1), v[0, :, :, 0], sink=sink, sink_value=value)[0]


def packed(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, value: Tensor) -> Tensor:
    cu = torch.tensor([0, 5, 5, 64], dtype=torch.int32)
    mask = stablemask(GAMMA, length=LENGTH, sink=sink, sink_value=value)
    q, k, v = [x[0].transpose(0, 1) for x in (q, k, v)]
    return varlen_attn(q, k, v, cu, cu, 64, 64, window_size=(-1, 0), score_mod=mask)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("fn", [flex, inner, alone, packed])
def test_fullgraph_forward_and_backward(fn: Callable[..., Tensor]):
    compare(fn, [rows(64)])


def test_a_value_per_key_head():
    compare(grouped, [rows(64, *learned(KV_HEADS))])


def test_no_new_graph_where_the_numbers_change():
    """Learned or not, and built outside of what is compiled."""
    assert compare(flex, [rows(64) for _ in range(4)]) == 1
    torch._dynamo.reset()
    sink, value = torch.zeros(HEADS), torch.zeros(HEADS, 16)
    mask = stablemask(0.1, length=LENGTH, sink=sink, sink_value=value)
    run = torch.compile(lambda q, k, v: flex_attention(q, k, v, score_mod=mask), fullgraph=True, backend="aot_eager")
    before, outs = counters["stats"]["unique_graphs"], []
    q, k, v = [x.detach() for x in leaves(2, HEADS, 64, 16)]
    for number in (0.0, 1.0, 2.0):
        sink.fill_(number)
        value.fill_(-number)
        outs.append(run(q, k, v))
        torch.testing.assert_close(outs[-1], flex_attention(q, k, v, score_mod=mask))
    assert counters["stats"]["unique_graphs"] - before == 1
    assert not torch.allclose(outs[1], outs[2])


@pytest.mark.parametrize("fn", [flex, inner])
def test_at_most_three_graphs_over_five_lengths(fn: Callable[..., Tensor]):
    assert compare(fn, [rows(n) for n in (64, 100, 33, 257, 130)]) <= 3


def test_errors_are_those_of_an_eager_call():
    run = torch.compile(flex, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"sink_value must be \(H, Dv\) = \(4, 16\)"):
        run(*rows(64, torch.zeros(HEADS), torch.zeros(3, 16)))


def layer(x: Tensor, sink: Tensor, value: Tensor) -> Tensor:
    q, k, v = x.unflatten(-1, (3, HEADS, 8)).permute(2, 0, 3, 1, 4)
    out = flex_attention(q, k, v, score_mod=stablemask(0.05, length=64, sink=sink, sink_value=value))
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).flatten(2).sin()


def selective(*inputs: Tensor) -> Tensor:
    contexts = partial(create_selective_checkpoint_contexts, save_attention)
    return checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_selective_checkpoint_runs_the_attention_once(compiled: bool):
    """The op's own output is saved, and must not be written to: it would get the value twice."""
    inputs = [torch.randn(2, 37, 3 * HEADS * 8), torch.randn(HEADS), torch.randn(HEADS, 8)]
    inputs = [x.requires_grad_() for x in inputs]
    expected = torch.autograd.grad(layer(*inputs).square().sum(), inputs)
    if compiled:
        run = torch.compile(selective, fullgraph=True, backend="aot_eager_decomp_partition")
        actual = torch.autograd.grad(run(*inputs).square().sum(), inputs)
    else:
        with Operations() as found:
            actual = torch.autograd.grad(selective(*inputs).square().sum(), inputs)
        assert found.ran.count(ATTENTION) == 1
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_export():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sink, self.value = nn.Parameter(torch.randn(HEADS)), nn.Parameter(torch.randn(HEADS, 16))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = stablemask(0.1, length=LENGTH, sink=self.sink, sink_value=self.value)
            return scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=mask)

    module, inputs = Attention(), tuple(x.detach() for x in leaves(2, HEADS, 64, 16))
    length = torch.export.Dim("length", min=2, max=512)
    program = torch.export.export(module, inputs, dynamic_shapes=[{2: length}] * 3)
    for n in (64, 33):
        cut = [x[:, :, :n] for x in inputs]
        torch.testing.assert_close(program.module()(*cut), module(*cut))


def test_a_forward_pass_is_the_kernel_and_two_passes_over_its_output():
    """s * o in place as ever, and p_sink * v in place; without a value nothing is run that was not before."""
    inputs = [x.detach() for x in leaves(1, HEADS, 64, 16)]
    sink, value, counts = torch.randn(HEADS), torch.randn(HEADS, 16), []
    every_option: list[dict[str, Any]] = [{}, {"sink": sink}, {"sink": sink, "sink_value": value}]
    for options in every_option:
        mask: Any = stablemask(GAMMA, length=64, **options)
        run = partial(flex_attention, *inputs, score_mod=mask)
        run()  # log M is computed once
        every, large = operations(run, (1, HEADS, 64, 16))
        counts.append((every, large))
    kernel = {"aten::_scaled_dot_product_flash_attention_for_cpu": 1, "aten::mul_": 1}
    assert counts[0][1] == counts[1][1] == kernel
    assert counts[2][1] == {**kernel, "aten::addcmul_": 1}
    assert counts[0][0] == counts[1][0] == Counter(kernel) + Counter({"aten::sub": 1, "aten::sigmoid": 1})


def test_a_training_step_with_a_fixed_value_adds_nothing_to_the_kernels_backward():
    inputs, grad = leaves(1, HEADS, 64, 16), torch.randn(1, HEADS, 64, 16)
    mask = stablemask(GAMMA, length=64, sink=torch.randn(HEADS), sink_value=torch.randn(HEADS, 16))
    out = flex_attention(*inputs, score_mod=mask)  # pyright: ignore[reportArgumentType, reportCallIssue]
    _, large = operations(lambda: torch.autograd.grad(out, inputs, grad), (1, HEADS, 64, 16))  # pyright: ignore
    assert large == {"aten::_scaled_dot_product_flash_attention_for_cpu_backward": 1}
