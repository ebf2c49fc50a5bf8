"""torch.compile: fullgraph, forward and backward, dynamic lengths, no recompilation for gamma."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

from sm_flex import flex_attention, headwise_gamma, scaled_dot_product_attention, stablemask, varlen_attn
from tests.helpers.problems import leaves

pytestmark = pytest.mark.usefixtures("fresh_compiler")
LENGTHS = (64, 100, 33, 257, 130)


def rows(length: int, *extra: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [*leaves(2, 4, length, 16, dtype=dtype), *extra]


def compare(fn: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[list[Tensor]]) -> int:
    """Compiled against eager on each set of inputs, out and gradients; returns how many graphs were captured."""
    before = counters["stats"]["unique_graphs"]
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager" if len(inputs) > 2 else "inductor")
    for tensors in inputs:
        again = [x.detach().clone().requires_grad_(x.requires_grad) for x in tensors]
        expected, actual = fn(*tensors), compiled(*again)
        expected, actual = (x if isinstance(x, tuple) else (x,) for x in (expected, actual))
        sum(((i + 1) * x.cos()).sum() for i, x in enumerate(expected)).backward()
        sum(((i + 1) * x.cos()).sum() for i, x in enumerate(actual)).backward()
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(again, tensors, strict=True):
            if a.requires_grad:
                torch.testing.assert_close(a.grad, b.grad)
    return counters["stats"]["unique_graphs"] - before


OUTSIDE = stablemask(0.5, length=600)
HEADWISE = headwise_gamma(4)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, score_mod=OUTSIDE)  # pyright: ignore[reportReturnType]


def with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, aux = flex_attention(q, k, v, score_mod=OUTSIDE, return_aux=AuxRequest(lse=True))
    return out, aux.lse  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]


def number_inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, score_mod=stablemask(0.5))  # pyright: ignore[reportReturnType]


def learned(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    return flex_attention(q, k, v, score_mod=stablemask(gamma, length=600))  # pyright: ignore[reportReturnType]


def inner(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = stablemask(0.5, length=600, score_mod=lambda s, b, h, i, j: s - (i - j) * 0.1 * (h + 1))
    return flex_attention(q, k, v, score_mod=mask)  # pyright: ignore[reportReturnType]


def positioned(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=stablemask(HEADWISE, length=600, positions=positions))


def masked(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, score_mod=OUTSIDE)


def same_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, q, q, score_mod=OUTSIDE) + k + v  # pyright: ignore[reportOperatorIssue]


@pytest.mark.parametrize("fn", [plain, with_lse, number_inside, inner, same_tensor])
def test_fullgraph_forward_and_backward(fn: Callable[..., Tensor]):
    compare(fn, [rows(64), rows(100)])


def test_learned_gamma():
    compare(learned, [rows(64, headwise_gamma(4).requires_grad_())])


def test_positions_and_masks():
    compare(positioned, [rows(64, torch.arange(64))])
    compare(masked, [rows(40, torch.rand(2, 1, 40, 40) > 0.3), rows(56, torch.rand(2, 1, 56, 56) > 0.3)])


def test_float64():
    compare(plain, [rows(64, dtype=torch.float64)])


@pytest.mark.parametrize("fn", [plain, with_lse, learned, positioned, inner])
def test_at_most_three_graphs_over_five_lengths(fn: Callable[..., Tensor]):
    extra: dict[Callable[..., Tensor], Callable[[int], list[Tensor]]] = {
        learned: lambda n: [headwise_gamma(4).requires_grad_()],
        positioned: lambda n: [torch.arange(n)],
    }
    inputs = [rows(n, *extra.get(fn, lambda n: [])(n)) for n in LENGTHS]
    assert compare(fn, inputs) <= 3


def packed_rows(length: int) -> list[Tensor]:
    bounds = torch.tensor([0, 5, 5, length // 2, length], dtype=torch.int32)
    return [*leaves(length, 4, 16), bounds]


def packed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    longest = q.shape[0]
    return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), score_mod=OUTSIDE)  # pyright: ignore


def test_varlen():
    compare(packed, [packed_rows(37)])
    assert compare(packed, [packed_rows(n) for n in LENGTHS]) <= 3


@pytest.mark.parametrize("dynamic", [None, True])
def test_torchs_choice_is_made_when_traced(dynamic: bool | None, monkeypatch: pytest.MonkeyPatch):
    """The way CUDA calls choose, walked on a CPU: lengths stay dynamic, a constant answers."""
    from sm_flex.engines import Need, choose, torch_choice

    flash = SDPBackend.FLASH_ATTENTION.value

    def through_torchs_choice(need: Need) -> list[str]:
        return ["cpu" if torch_choice.torchs_choice(need) == flash else "dense"]

    monkeypatch.setattr(choose, "candidates", through_torchs_choice)
    before = counters["stats"]["unique_graphs"]
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in LENGTHS:
        q, k, v = rows(length)
        torch.testing.assert_close(compiled(q, k, v), plain(q, k, v))
    assert counters["stats"]["unique_graphs"] - before <= 3


@pytest.mark.parametrize("nested", [False, True])
def test_tensor_captured_by_an_inner_score_mod(nested: bool):
    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        def bias(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + (table[h][j] if nested else table[h, j])

        return flex_attention(q, k, v, score_mod=stablemask(0.3, score_mod=bias))

    compare(run, [rows(33, torch.randn(4, 33, requires_grad=True))])


def test_decode_steps_do_not_recompile():
    def step(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        mask = stablemask(HEADWISE, length=600, positions=positions)
        return flex_attention(q, k, v, score_mod=mask)  # pyright: ignore[reportReturnType]

    inputs = []
    for n in LENGTHS:
        q, k, v = rows(n)
        inputs.append([q[:, :, -1:].detach().requires_grad_(), k, v, torch.tensor([n - 1])])
    assert compare(step, inputs) <= 3


@pytest.mark.parametrize("heads", [None, 4])
def test_a_new_gamma_does_not_recompile(heads: int | None):
    """Built outside the region from a number, or from a tensor: one graph for every value."""
    before = counters["stats"]["unique_graphs"]

    def run(q: Tensor, mask: object) -> Tensor:
        return flex_attention(q, q, q, score_mod=mask)  # pyright: ignore

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    q = torch.randn(2, 4, 33, 8)
    for gamma in (0.5, 0.25, 0.0, 3.0):
        mask = stablemask(gamma if heads is None else torch.full((heads,), gamma), length=64)
        torch.testing.assert_close(compiled(q, mask), run(q, mask))
    assert counters["stats"]["unique_graphs"] - before == 1


def test_block_mask():
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=OUTSIDE, block_mask=block_mask)  # pyright: ignore

    block_mask = create_block_mask(lambda b, h, i, j: i - j < 20, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    compare(run, [rows(64)])


def test_sdpa_kernel_inside_the_region():
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return plain(q, k, v)

    q, k, v = rows(33)
    program = torch._dynamo.export(run)(q, k, v)
    names = {str(node.target) for node in program.graph_module.graph.nodes}
    assert not any("flash_attention_for_cpu" in name for name in names)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), run(q, k, v))


def graphs_of(fn: Callable[..., Tensor], inputs: list[Tensor]) -> list[str]:
    """The graphs of a training step, forward and backward, as AOTAutograd hands them to a compiler."""
    from functorch.compile import make_boxed_func  # pyright: ignore
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph.print_readable(print_output=False))
        return make_boxed_func(graph.forward)

    compiled = torch.compile(fn, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    out = compiled(*inputs)
    out.backward(torch.empty_like(out))
    return graphs


@pytest.mark.parametrize("layout", ["BHSD", "BSHD", "packed"])
def test_a_training_step_does_not_copy_the_gradient_of_out(layout: str):
    """Dynamo makes the gradients of a Function contiguous: it must return out as a projection leaves its gradient."""
    attention, inputs = learned, rows(64, headwise_gamma(4).requires_grad_())
    if layout == "packed":
        attention, inputs = packed, packed_rows(64)
    elif layout == "BSHD":
        inputs[:3] = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs[:3]]

    def layer(w: Tensor, *inputs: Tensor) -> Tensor:
        out = attention(*inputs)
        return (out if layout == "packed" else out.transpose(1, 2)).flatten(-2) @ w

    _, backward = graphs_of(layer, [torch.randn(64, 64, requires_grad=True), *inputs])
    assert "aten.clone" not in backward


def test_the_aten_op_stays_visible():
    """Selective checkpointing policies and FLOP counters find the kernel by its name in the graph."""
    graphs = graphs_of(plain, rows(64))
    assert "_scaled_dot_product_flash_attention_for_cpu.default" in graphs[0]
    assert "_scaled_dot_product_flash_attention_for_cpu_backward.default" in graphs[1]
    assert graphs[0].count("_scaled_dot_product_flash_attention_for_cpu.default(") == 1
