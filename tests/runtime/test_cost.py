"""What a call may cost, counted and not timed: operations, passes over the output, compiled kernels, memory against length."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import metrics
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask
from torch.profiler import ProfilerActivity, profile

from benchmarks import memory
from benchmarks.speed.timing import training_peak
from sm_flex import flex_attention, headwise_gamma, scaled_dot_product_attention, stablemask
from sm_flex.epilogue.remask import epilogue
from sm_flex.mass.closed_form import log_mass_table
from sm_flex.mass.table import Mass
from sm_flex.testing import assert_matches_eq11
from sm_flex.visibility.bias import mask_bias
from tests.helpers.problems import leaves, qkv

CPU = torch.device("cpu")
Call = Callable[..., Any]
VIEWS = ("aten::unsqueeze", "aten::detach", "aten::transpose", "aten::resolve_conj", "aten::resolve_neg")


def operations(run: Callable[[], Any], shape: tuple[int, ...]) -> tuple[Counter[str], Counter[str]]:
    """The aten operations of a run, and those of them that take a tensor of the shape; views and such count for nothing."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        run()
    every: Counter[str] = Counter()
    large: Counter[str] = Counter()
    for event in found.events() or []:
        parent = event.cpu_parent
        inside = parent is not None and parent.name.startswith("aten::")
        if event.name.startswith("aten::") and not inside and event.name not in VIEWS:
            every[event.name] += 1
            large[event.name] += list(shape) in [list(x) for x in event.input_shapes]
    return every, +large


def test_a_forward_pass_is_the_kernel_and_one_pass_over_its_output():
    mask, inputs = stablemask(headwise_gamma(4), length=64), [x.detach() for x in leaves(1, 4, 64, 16)]
    flex_attention(*inputs, score_mod=mask)  # log M is computed once
    every, large = operations(lambda: flex_attention(*inputs, score_mod=mask), (1, 4, 64, 16))
    assert large == {"aten::_scaled_dot_product_flash_attention_for_cpu": 1, "aten::mul_": 1}
    assert every == large + Counter({"aten::sub": 1, "aten::sigmoid": 1})


def test_a_training_step_adds_nothing_to_the_kernels_backward():
    mask, inputs = stablemask(headwise_gamma(4), length=64), leaves(1, 4, 64, 16)
    grad = torch.randn(1, 4, 64, 16)
    out = flex_attention(*inputs, score_mod=mask)  # pyright: ignore[reportArgumentType, reportCallIssue]
    _, large = operations(lambda: torch.autograd.grad(out, inputs, grad), (1, 4, 64, 16))  # pyright: ignore
    assert large == {"aten::_scaled_dot_product_flash_attention_for_cpu_backward": 1}


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("sink", [None, 0.5])
def test_compiled_code_needs_no_kernel_of_its_own(sink: float | None, heads: int, fresh_compiler: None):
    """The first kernel that Inductor builds for a CPU takes it some ten seconds. Neither the mass nor the epilogue is one.

    With more than one head it builds one for the gradient's memory layout, for plain causal attention too.
    """
    mask, inputs = stablemask(headwise_gamma(heads), length=64, sink=sink), leaves(1, heads, 64, 16)
    run = torch.compile(lambda q, k, v: flex_attention(q, k, v, score_mod=mask), fullgraph=True)
    metrics.reset()
    out = run(*inputs)
    assert metrics.generated_kernel_count == 0
    grad = torch.randn(out.shape)
    grads = torch.autograd.grad(out, inputs, grad)
    assert heads > 1 or metrics.generated_kernel_count == 0
    expected = flex_attention(*inputs, score_mod=mask)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs, grad))  # pyright: ignore


@pytest.mark.parametrize("may_be_masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_value", [True, False])
def test_opcheck_of_the_epilogue(with_value: bool, dtype: torch.dtype, may_be_masked: bool):
    """And its results are those of the epilogue that eager code takes."""
    out, wide = torch.randn(2, 5, 3, 8).to(dtype).transpose(1, 2), torch.promote_types(dtype, torch.float32)
    lse, log_mass = torch.randn(2, 5, 3, dtype=wide).transpose(1, 2), torch.randn(3, 5, dtype=wide)
    if may_be_masked:
        lse[0, 1, 2], out[0, 1, 2] = -math.inf, math.nan
    sink, value = (torch.randn(3, 1, dtype=wide), torch.randn(3, 8, dtype=wide)) if with_value else (None, None)
    torch.library.opcheck(torch.ops.sm_flex.epilogue_cpu.default, (out, lse, log_mass, sink, value, may_be_masked))
    found = torch.ops.sm_flex.epilogue_cpu(out, lse, log_mass, sink, value, may_be_masked)
    mass = Mass(log_mass, sink_HS=sink, sink_value_HD=value)
    expected = epilogue(out.clone(), lse, mass, in_place=False, may_be_masked=may_be_masked)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("positions", [None, torch.arange(9), torch.arange(18).reshape(2, 9)])
@pytest.mark.parametrize("gamma", [torch.tensor(0.3, dtype=torch.float64), headwise_gamma(4)])
@pytest.mark.parametrize("sink", [None, torch.tensor(0.2), torch.randn(4), torch.randn(2, 4, 9)])
def test_opcheck_of_the_table(gamma: Tensor, positions: Tensor | None, sink: Tensor | None):
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    for dtype in (torch.float32, torch.float64):
        for documents in (None, cu) if positions is None else (None,):
            inputs = (gamma, positions, documents, sink, 12, 9)
            for heads in (0, 4):
                torch.library.opcheck(torch.ops.sm_flex.log_mass_table.default, (*inputs, dtype, heads))
                found = torch.ops.sm_flex.log_mass_table(*inputs, dtype, heads)
                assert torch.equal(found, log_mass_table(*inputs, dtype).expand(found.shape))


def test_blocks_of_rows_where_slots_do_not_follow_the_sequence(monkeypatch: pytest.MonkeyPatch):
    """ordered=False: the block_mask alone says who sees whom, so no block of rows may leave out keys beyond its slots."""
    from sm_flex.engines import dense

    q, k, v = qkv(1, 2, 2, 64, 64, 8)
    order = torch.arange(63, -1, -1)  # the slots hold the sequence backwards
    block_mask = create_block_mask(lambda b, h, i, j: order[j] <= order[i], None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    mask = stablemask(0.1, length=64, positions=order, ordered=False)
    forwards = [x.flip(2) for x in (q, k, v)]
    expected = flex_attention(*forwards, score_mod=stablemask(0.1, length=64)).flip(2)  # pyright: ignore
    monkeypatch.setattr(dense, "BLOCK_SCORES", 1)
    out = flex_attention(q, k, v, score_mod=mask, block_mask=block_mask)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", sorted(set(memory.entry_points(64)) - {"SDPA"}))
def test_memory_grows_with_the_length_and_not_its_square(way: str):
    """Four times the length: an S x S float would be 64 MiB at 4096 and 16 times what it was; SDPA holds 4 times as much."""
    peaks = {}
    for name, length in ((way, 1024), (way, 4096), ("SDPA", 4096)):
        q, k, v = leaves(1, 1, length, 32)
        peaks[name, length] = training_peak(memory.entry_points(length)[name], (q, k, v, torch.randn(1, 1, length, 32)), CPU)
    # A block of rows may be held beside what SDPA holds, whatever the length.
    assert peaks[way, 4096] < 1.3 * peaks["SDPA", 4096] + 2**24
    assert peaks[way, 4096] < 5 * peaks[way, 1024]


@pytest.mark.parametrize("way", ["plain", "boolean padding mask", "float padding mask", *memory.IN_PARTS])
def test_the_peak_of_a_training_pass(way: str, monkeypatch: pytest.MonkeyPatch):
    """The targets of benchmarks.memory, at an eighth of its length and with blocks that are an eighth of theirs.

    Only the kernel's workspace has the same size at every length: 1 MiB, beside 8 tensors of the size of q.
    """
    from sm_flex.engines import cpu_chunks, dense

    monkeypatch.setattr(dense, "BLOCK_SCORES", dense.BLOCK_SCORES // 8)
    monkeypatch.setattr(cpu_chunks, "KEYS", cpu_chunks.KEYS // 8)
    peaks = {}
    for name in ("SDPA", way):
        q, k, v = leaves(1, 1, 4096, 64)
        peaks[name] = training_peak(memory.entry_points(4096)[name], (q, k, v, torch.randn(1, 1, 4096, 64)), CPU)
    workspace = peaks["SDPA"] - 8 * 4 * 4096 * 64
    own = 0 if way in ("ALiBi score_mod", "block_mask") else workspace
    assert (peaks[way] - own) + own / 8 <= memory.target(way) * (peaks["SDPA"] - workspace * 7 / 8)


@pytest.mark.parametrize("kind", ["none", "bool rows", "bool", "float", "float of one row"])
def test_a_chunk_longer_than_a_block_of_rows(kind: str, monkeypatch: pytest.MonkeyPatch):
    from sm_flex.engines import cpu_chunks

    monkeypatch.setattr(cpu_chunks, "ROWS", 8)
    num_queries, num_keys, heads = 29, 37, 4
    positions = torch.arange(num_keys - num_queries, num_keys)
    shape = {"bool rows": (2, 1, num_queries, 1), "bool": (1, heads, num_queries, num_keys), "float": (num_queries, num_keys)}
    part = torch.rand(shape.get(kind, (1, num_keys))) > 0.3
    attn_mask = part if kind.startswith("bool") else torch.where(part, torch.randn(part.shape).double(), -math.inf)
    gamma = torch.linspace(0.02, 0.9, heads).double()

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor | None]:
        mask = stablemask(gamma, length=60, positions=positions)
        if kind == "none":
            out, aux = flex_attention(q, k, v, score_mod=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
            return out, aux.lse
        return scaled_dot_product_attention(q, k, v, attn_mask, score_mod=mask, enable_gqa=True), None

    options: dict[str, Any] = {"length": 60, "positions": positions}
    if kind != "none":
        options |= {"visible": part} if kind.startswith("bool") else {"bias": attn_mask}
    assert_matches_eq11(run, [*qkv(2, heads, 2, num_queries, num_keys, 8), gamma], options, with_lse_grad=kind == "none")


def test_fewer_keys_than_queries_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch):
    """The first rows see nothing: blocks of fully masked rows alone."""
    from sm_flex.engines import cpu_chunks

    q, k, v = qkv(1, 2, 2, 40, 7, 8)
    mask = stablemask(0.1, length=64, positions=torch.arange(40))
    expected = flex_attention(q, k, v, score_mod=mask)
    monkeypatch.setattr(cpu_chunks, "ROWS", 8)
    torch.testing.assert_close(flex_attention(q, k, v, score_mod=mask), expected, rtol=0, atol=1e-12)


def test_a_broadcast_mask_stays_a_view():
    keep = torch.rand(2, 1, 1, 13) > 0.5
    assert mask_bias(keep, 13, 13, torch.float32).untyped_storage().nbytes() == 4 * keep.numel()


def test_not_far_slower_than_plain_causal_attention():
    """A ratio of processor time, which other processes do not add to, on one thread with a wide margin: it is about 1.0."""
    mask, shape = stablemask(headwise_gamma(4), length=512), (1, 4, 512, 64)
    calls = {
        "plain": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "ours": lambda q, k, v: flex_attention(q, k, v, score_mod=mask),
    }
    q, k, v = leaves(*shape)
    times: dict[str, list[float]] = {name: [] for name in calls}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(15):
            for name, call in calls.items():
                start = time.process_time()
                call(q, k, v).sum().backward()  # pyright: ignore[reportAttributeAccessIssue]
                times[name].append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert statistics.median(times["ours"]) < 1.5 * statistics.median(times["plain"])


def test_the_peak_is_what_is_held_at_once():
    """The measure itself: four inputs, the sum of two, and the sum of three before that of two is let go."""
    q, k, v = leaves(1, 1, 512, 64)
    assert training_peak(lambda q, k, v: q + k + v, (q, k, v, torch.randn(q.shape)), CPU) == 6 * 4 * q.numel()
