"""What can be known of the flex engine without a GPU: its block lists, and its gradients where torch lets it differentiate."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from sm_flex.mass.closed_form import largest_pseudo_score
from sm_flex.score_mod import stablemask
from sm_flex.testing import assert_matches_eq11, oracle
from sm_flex.visibility import blocks
from sm_flex.visibility.blocks import dense_blocks, narrow_block_mask
from sm_flex.visibility.rows import block_mask_rows, causal_rows
from tests.helpers.problems import qkv


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(64, 64), (200, 200), (40, 200), (200, 131)])
@pytest.mark.parametrize("kind", ["none", "window", "everything", "per head"])
def test_block_masks_are_narrowed_to_the_causal_slots(kind: str, num_queries: int, num_keys: int, block: int):
    """From block indices alone, what flex will see is the mask and causality: in the lists, and within partial blocks."""
    mods = {
        "window": lambda b, h, i, j: i - j < 30,
        "everything": lambda b, h, i, j: i >= 0,
        "per head": lambda b, h, i, j: (i - j < 30) | (h == 1),
    }
    causal = causal_rows(num_queries, num_keys, torch.device("cpu"))(0, num_queries)
    expected = causal
    block_mask = None
    heads = 2 if kind == "per head" else 1
    if kind != "none":
        block_mask = create_block_mask(
            mods[kind], None, heads if heads > 1 else None, num_queries, num_keys, device="cpu", BLOCK_SIZE=block
        )
        b, h, i, j = (torch.arange(n) for n in (1, heads, num_queries, num_keys))
        expected = causal & mods[kind](b[:, None, None, None], h[:, None, None], i[:, None], j)
    narrowed = narrow_block_mask(block_mask, num_queries, num_keys, torch.device("cpu"))
    # block_mask_rows reads the lists as flex does: full blocks whole, partial blocks by mask_mod.
    seen = block_mask_rows(narrowed, num_queries, num_keys, heads, 1, ordered=False)(0, num_queries)
    assert torch.equal(seen.expand(1, heads, -1, -1), expected.expand(1, heads, -1, -1))
    # The lists of the backward say the same, transposed.
    block_q, block_kv = narrowed.BLOCK_SIZE
    rows, columns = -(-num_queries // block_q), -(-num_keys // block_kv)
    for of_rows, of_columns in (
        ((narrowed.kv_num_blocks, narrowed.kv_indices), (narrowed.q_num_blocks, narrowed.q_indices)),
        ((narrowed.full_kv_num_blocks, narrowed.full_kv_indices), (narrowed.full_q_num_blocks, narrowed.full_q_indices)),
    ):
        assert of_rows[0] is not None
        assert of_columns[0] is not None
        by_row = dense_blocks(of_rows[0], of_rows[1], columns)
        by_column = dense_blocks(of_columns[0], of_columns[1], rows)
        assert torch.equal(by_row, by_column.transpose(-1, -2))
        assert sorted(of_columns[1].flatten().unique().tolist()) == list(range(rows))  # pyright: ignore
    if block_mask is None:
        # Nothing above the diagonal is listed, and below it blocks are full.
        assert narrowed.full_kv_num_blocks is not None
        assert (narrowed.kv_num_blocks <= -(-128 // 128) + 1).all()


def test_narrowing_is_done_once_for_a_block_mask():
    block_mask = create_block_mask(lambda b, h, i, j: i - j < 30, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    device = torch.device("cpu")
    assert narrow_block_mask(block_mask, 64, 64, device) is narrow_block_mask(block_mask, 64, 64, device)
    assert narrow_block_mask(None, 64, 64, device) is narrow_block_mask(None, 64, 64, device)


def test_a_narrowed_block_mask_may_be_handed_back():
    """Narrowed once, a caller may keep it across layers and graphs. With another mask_mod or other lists it is another mask."""
    device = torch.device("cpu")
    block_mask = create_block_mask(lambda b, h, i, j: i - j < 30, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    for narrowed in (narrow_block_mask(block_mask, 64, 64, device), narrow_block_mask(None, 64, 64, device)):
        assert narrow_block_mask(narrowed, 64, 64, device) is narrowed
    narrowed = blocks._narrow(block_mask, 64, 64, device)
    narrowed.mask_mod = lambda b, h, i, j: i - j < 7
    again = narrow_block_mask(narrowed, 64, 64, device)
    i, j = torch.arange(64).unsqueeze(1), torch.arange(64)
    assert torch.equal(block_mask_rows(again, 64, 64, 1, 1, ordered=False)(0, 64)[0, 0], (j <= i) & (i - j < 7))


@pytest.mark.parametrize(("kind", "sorts"), [("none", False), ("narrowed", False), ("window", True)])
def test_compiled_code_sorts_no_blocks_of_the_causal_slots(kind: str, sorts: bool, fresh_compiler: None):
    """In a graph nothing can be cached. The causal slots alone are ranges, and a mask that was narrowed stays as it is."""
    window = create_block_mask(lambda b, h, i, j: i - j < 30, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    masks = {"none": None, "narrowed": narrow_block_mask(window, 64, 64, torch.device("cpu")), "window": window}
    block_mask, graphs = masks[kind], []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    def run(x: Tensor) -> Tensor:
        narrowed = narrow_block_mask(block_mask, 64, 64, x.device)
        assert narrowed.q_indices is not None
        return x + narrowed.kv_indices.sum() + narrowed.q_indices.sum()

    x = torch.zeros(())
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend=keep)(x), run(x))
    assert ("argsort" in "".join(graphs)) == sorts


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("with_lse_grad", [False, True])
@pytest.mark.parametrize(("ordered", "value_heads"), [(False, 0), (True, 0), (True, 2), (True, 4)])
def test_flex_engine_where_torch_lets_it_differentiate(
    ordered: bool, value_heads: int, with_lse_grad: bool, monkeypatch: pytest.MonkeyPatch
):
    """torch's eager flex differentiates on a CPU once its device check is out of the way: the engine as a GPU would run it."""
    import torch.nn.attention.flex_attention as torch_flex

    from sm_flex.engines import flex

    monkeypatch.setattr(torch_flex, "_validate_device", lambda *args: None)
    real = torch_flex._apply_kernel_options

    def with_lse(*args, **kwargs):
        return {**real(*args, **kwargs), "OUTPUT_LOGSUMEXP": True}

    monkeypatch.setattr(torch_flex, "_apply_kernel_options", with_lse)
    # Unordered, the BlockMask must itself be causal; ordered, it is narrowed.
    block_mask = create_block_mask(
        lambda b, h, i, j: (i - j < 30) & (ordered | (j <= i)), None, None, 64, 64, device="cpu", BLOCK_SIZE=16
    )

    def sink_of(tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip(("sink", "sink_value"), tensors, strict=False))

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, *sink: Tensor):
        options: Any = {"positions": None if ordered else torch.arange(64), "ordered": ordered, **sink_of(sink)}
        mask = stablemask(gamma, length=70, score_mod=lambda s, b, h, i, j: s - 0.1 * (i - j), **options)
        mass = mask.mass(q.device, 64, 64, torch.float32, heads=4)
        out, lse, _ = flex.attend(
            q, k, v, mask, mass, scale=0.25, block_mask=block_mask, kernel_options={}, max_scores=False
        )  # fmt: skip
        return out, lse

    i = torch.arange(64)
    kwargs = {"length": 70, "scale": 0.25, "visible": i[:, None] - i < 30, "bias": -0.1 * (i[:, None] - i)}
    inputs = [*qkv(2, 4, 2, 64, 64, 16, torch.float32), torch.tensor([0.5, 0.1, 0.01, 0.0])]
    inputs += [torch.linspace(-1.0, 4.0, 4), torch.randn(value_heads, 16)] if value_heads else []
    assert_matches_eq11(run, inputs, lambda *sink: {**kwargs, **sink_of(sink)}, with_lse_grad=with_lse_grad)
    if value_heads:  # without a gradient the epilogue works in place
        with torch.no_grad():
            torch.testing.assert_close(run(*inputs), run(*(x.clone().requires_grad_() for x in inputs)))


def test_row_maxima_are_those_of_the_whole_row():
    """max_scores of A_SM: the largest pseudo score of row p is -(p+1) gamma, and row N-1 has none."""
    largest = largest_pseudo_score(torch.tensor(0.5), torch.arange(5), 4)
    assert largest.tolist() == [[-0.5, -1.0, -1.5, -math.inf, -2.5]]
    q = k = torch.zeros(1, 1, 5, 2)
    _, lse = oracle(q, k, k, gamma=0.5, length=4)
    assert (lse >= largest).all()
    each = stablemask(0.5, length=4).largest_pseudo_score(torch.device("cpu"), 5, 5)
    assert torch.equal(each, largest)
