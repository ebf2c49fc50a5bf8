"""Activation checkpointing: gradients are those without it, and a saved attention is not run again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sm_flex import flex_attention, stablemask
from tests.helpers.watching import Operations

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
MASK = stablemask(0.05, length=64)


def layer(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = (x @ w).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    out = flex_attention(q, k, v, score_mod=MASK)
    assert isinstance(out, Tensor)
    return (out.transpose(1, 2).flatten(2) + x).sin()


def save_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op is ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(2, 37, 32, generator=generator).requires_grad_(),
        (torch.randn(32, 96, generator=generator) / 4).requires_grad_(),
    )


def gradients(run: Callable[[Tensor, Tensor], Tensor]) -> tuple[list[Tensor], int]:
    x, w = inputs()
    with Operations() as operations:
        grads = torch.autograd.grad((run(x, w) ** 2).sum(), (x, w))
    return list(grads), operations.ran.count(ATTENTION)


def selective(x: Tensor, w: Tensor) -> Tensor:
    contexts = partial(create_selective_checkpoint_contexts, save_attention)
    return checkpoint(layer, x, w, use_reentrant=False, context_fn=contexts)  # pyright: ignore[reportReturnType]


def full(x: Tensor, w: Tensor) -> Tensor:
    return checkpoint(layer, x, w, use_reentrant=False)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(("run", "calls"), [(layer, 1), (full, 2), (selective, 1)])
def test_eager(run: Callable[[Tensor, Tensor], Tensor], calls: int):
    """The op's own output, saved under a selective checkpoint, must not be written to: it would be remasked twice."""
    expected, _ = gradients(layer)
    actual, count = gradients(run)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert count == calls


@pytest.mark.parametrize("run", [full, selective])
def test_compiled(run: Callable[[Tensor, Tensor], Tensor], fresh_compiler: None):
    expected, _ = gradients(layer)
    x, w = inputs()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager_decomp_partition")
    actual = torch.autograd.grad((compiled(x, w) ** 2).sum(), (x, w))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_selective_saves_the_attention(fresh_compiler: None):
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition  # pyright: ignore
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable:
        graphs.append([node.target for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    x, w = inputs()
    (torch.compile(selective, fullgraph=True, backend=backend)(x, w) ** 2).sum().backward()
    forward, backward = graphs
    assert forward.count(ATTENTION) == 1
    assert backward.count(ATTENTION) == 0


def test_the_engines_output_is_written_to_only_where_nobody_watches():
    """In place without a dispatch mode, a new buffer under one."""
    from sm_flex.epilogue.remask import epilogue
    from sm_flex.mass.table import Mass

    out, lse, mass = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5), Mass(torch.zeros(1, 5))
    with Operations():
        new, _ = epilogue(out, lse, mass, in_place=True)
    assert new is not out
    kept = out.clone()
    assert torch.equal(out, kept)
    assert epilogue(out, lse, mass, in_place=True)[0] is out
    torch.testing.assert_close(out, new)
