"""The remask epilogue as one Triton launch: log M computed inside, saturated tiles neither read nor written.

s tends to 1 as the mass fades. Where 1 - s is below half an ulp of the output's dtype, s * out rounds to out
itself, and a tile of which all rows are that far is left alone. So the kernel reads 4 bytes per row (lse),
writes 4 (lse'), and touches the 2 * D * itemsize bytes of an output row only where they can change. The test
is on s as it will be used, so no bit depends on it.

A sink may carry a value v: out' = s * out + p * v in float32, p = exp(sink - lse'), then cast. A tile is then
left alone only where p, too, is 0 in float32 in all of its rows: however small p is, an element of out may be 0.
(What may depend on that is the sign of a zero.)
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from sm_flex.epilogue.formula import exp_difference, real_share_and_lse, times_share
from sm_flex.mass.closed_form import HUGE
from sm_flex.mass.table import Mass
from sm_flex.runtime import plain_eager

# 1 - s at or above this can change an output of the dtype: half the gap below a power of two.
HALF_ULP = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-25}
# Bytes of a tile, which one warp holds in its registers: at head_dim 128 in bf16 it has 32 rows, one per
# thread. More warps would work out log M of a row more than once (benchmarks.kernel_report counts).
TILE_BYTES = 8192
MAX_ROWS = 128
NUM_WARPS = 1
# CUDA's limit on a grid's second and third dimension.
MAX_GRID = 65535

# Where a row's position comes from.
ARANGE, POSITIONS, CU_SEQLENS = 0, 1, 2

GAMMA_HUGE = tl.constexpr(HUGE)


@triton.jit
def _log_ratio(x):
    """g(x) = log((1 - e^-x) / x), by its series near 0 (mass/closed_form.py)."""
    y2 = x * x
    even = 1 / 181440 + y2 * (-1 / 9676800 + y2 * (1 / 479001600))
    even = y2 * (1 / 24 + y2 * (-1 / 2880 + y2 * even))
    z = tl.abs(x)
    small = z < 0.5
    z = tl.where(small, 1.0, z)
    return tl.where(small, even - 0.5 * x, tl.log(1.0 - tl.exp(-z)) - tl.log(z) + tl.maximum(-x, 0.0))


@triton.jit
def _log_mass(gamma, position, length):
    """log M(p) in closed form (mass/closed_form.py)."""
    terms = tl.where(position >= length, 1, length - 1 - position)
    n = tl.where(terms == 0, 1, terms).to(tl.float32)
    finite = tl.where(gamma < GAMMA_HUGE, gamma, 1.0)
    log_m = -(position + 1).to(tl.float32) * finite + tl.log(n) + _log_ratio(n * finite) - _log_ratio(finite)
    log_m = tl.where(terms == 0, float("-inf"), log_m)
    return tl.where(gamma < GAMMA_HUGE, log_m, float("-inf"))


@triton.jit
def _first_row(cu_ptr, row, num_docs, ROWS: tl.constexpr):
    """Where the document of each row starts: the last one at or before it, by bisection."""
    low = tl.zeros([ROWS], tl.int32)
    if num_docs > 1:  # the compiler makes a constant of 1, and of a loop that never runs an error (Triton 3.6)
        high = low + num_docs
        width = num_docs
        while width > 1:
            middle = (low + high) // 2
            started = tl.load(cu_ptr + middle) <= row
            low = tl.where(started, middle, low)
            high = tl.where(started, high, middle)
            width = (width + 1) // 2
    return tl.load(cu_ptr + low).to(tl.int32)


@triton.jit
def remask_kernel(
    out_ptr, new_out_ptr, lse_ptr, new_lse_ptr, table_ptr, gamma_ptr, position_ptr, cu_ptr, sink_ptr, value_ptr,
    num_rows, num_heads, length, num_docs,
    out_b, out_h, out_s, out_d, new_b, new_h, new_s, new_d, lse_b, lse_h, lse_s, nlse_b, nlse_h, nlse_s,
    table_b, table_h, table_s, gamma_h, position_b, position_s, sink_b, sink_h, sink_s, value_h, value_d,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HALF_ULP: tl.constexpr,
    IN_PLACE: tl.constexpr, HAS_TABLE: tl.constexpr, POSITION: tl.constexpr, HAS_VALUE: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one (batch, head). new_out_ptr is out_ptr where IN_PLACE."""
    batch = (tl.program_id(0) // num_heads).to(tl.int64)
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    first = (tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)) * ROWS
    row = first + tl.arange(0, ROWS)
    inside = row < num_rows
    first = first.to(tl.int64)
    at = row.to(tl.int64)
    lse = tl.load(lse_ptr + batch * lse_b + head * lse_h + at * lse_s, mask=inside, other=0.0)
    sink = lse
    if HAS_VALUE:
        sink = sink_ptr + batch * sink_b + head * sink_h + at * sink_s
        sink = tl.load(sink, mask=inside, other=float("-inf")).to(tl.float32)

    # A loop of one turn. Triton computes what it can anew in the layout of the tile, where a row belongs to many
    # threads; what comes out of a loop it hands over instead, so that log M is worked out once per row.
    log_m, share, turns = lse, lse, num_heads
    while turns > 0:
        if HAS_TABLE:
            table = table_ptr + batch * table_b + head * table_h + at * table_s
            log_m = tl.load(table, mask=inside, other=0.0).to(tl.float32)
        else:
            gamma = tl.load(gamma_ptr + head * gamma_h).to(tl.float32)
            if POSITION == 1:
                position = tl.load(position_ptr + batch * position_b + at * position_s, mask=inside, other=0).to(tl.int64)
            elif POSITION == 2:
                position = row - _first_row(cu_ptr, row, num_docs, ROWS)
            else:
                position = row
            log_m = _log_mass(gamma, position, length)
        # A share below 0 marks a fully masked row.
        share = tl.where(lse == float("-inf"), -1.0, 1.0 / (1.0 + tl.exp(log_m - lse)))
        turns = 0

    top = tl.maximum(lse, log_m)
    gap = tl.where(top == float("-inf"), 0.0, -tl.abs(lse - log_m))
    new_lse = tl.where(top == float("-inf"), float("-inf"), top + tl.log(1.0 + tl.exp(gap)))
    tl.store(new_lse_ptr + batch * nlse_b + head * nlse_h + at * nlse_s, new_lse, mask=inside)

    # 1 - share is exact here, and 1 - HALF_ULP would not be in fp32. Not (... < ...), so that NaN counts as
    # touched.
    touched = inside & ~(1.0 - share < HALF_ULP)
    pseudo = share
    if HAS_VALUE:
        # Of one turn, as above. Its counter is new and comes second: Triton 3.8 crashes where a variable that only
        # goes into a loop stands before one that also comes out.
        pseudo, more = sink, num_heads
        while more > 0:
            # Where sink and lse' are both -inf, their difference is NaN.
            pseudo = tl.where(sink == float("-inf"), 0.0, tl.exp(sink - new_lse))
            more = 0
        touched = touched | (pseudo != 0.0)
    work = tl.sum(touched.to(tl.int32)) if IN_PLACE else 1
    if work > 0:  # pyright: ignore[reportOperatorIssue]
        column = tl.arange(0, BLOCK_D)
        in_tile = tl.arange(0, ROWS)
        tile = inside[:, None] & (column < HEAD_DIM)[None, :]
        source = out_ptr + batch * out_b + head * out_h + first * out_s
        source = source + (in_tile.to(tl.int64) * out_s)[:, None] + (column * out_d)[None, :]
        # Nothing is read of a fully masked row, whose out may hold NaN: 0 is stored.
        masked = share < 0.0
        out = tl.load(source, mask=tile & ~masked[:, None], other=0.0)
        new_out = out.to(tl.float32) * tl.where(masked, 0.0, share)[:, None]
        if HAS_VALUE:
            value = tl.load(value_ptr + head * value_h + column * value_d, mask=column < HEAD_DIM, other=0.0)
            new_out += pseudo[:, None] * value.to(tl.float32)[None, :]
        new_out = new_out.to(out.dtype)
        if IN_PLACE:
            tl.store(source, new_out, mask=tile)
        else:
            target = new_out_ptr + batch * new_b + head * new_h + first * new_s
            target = target + (in_tile.to(tl.int64) * new_s)[:, None] + (column * new_d)[None, :]
            tl.store(target, new_out, mask=tile)


# Both ops take out, lse and then the fields of Mass. torch infers their schema from what is written here. The
# defaults keep an exported program that was saved before sinks carried a value.
@triton_op("sm_flex::remask_", mutates_args={"out"})
def remask_in_place_op(
    out: Tensor,
    lse: Tensor,
    log_mass: Tensor | None,
    gamma: Tensor | None,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    length: int,
    sink: Tensor | None = None,
    sink_value: Tensor | None = None,
) -> Tensor:
    mass = Mass(log_mass, gamma, positions, cu_seqlens, length, sink, sink_value)
    if out.device.type == "cpu":
        new_out, new_lse = _reference(out, lse, mass)
        out.copy_(new_out)
        return new_lse
    new_lse = torch.empty_like(lse)
    _launch(wrap_triton(remask_kernel), out, out, lse, new_lse, mass, in_place=True)
    return new_lse


@triton_op("sm_flex::remask", mutates_args={})
def remask_op(
    out: Tensor,
    lse: Tensor,
    log_mass: Tensor | None,
    gamma: Tensor | None,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    length: int,
    sink: Tensor | None = None,
    sink_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    mass = Mass(log_mass, gamma, positions, cu_seqlens, length, sink, sink_value)
    if out.device.type == "cpu":
        return _reference(out, lse, mass)
    new_out, new_lse = torch.empty_like(out), torch.empty_like(lse)
    _launch(wrap_triton(remask_kernel), out, new_out, lse, new_lse, mass, in_place=False)
    return new_out, new_lse


def launch(out: Tensor, lse: Tensor, mass: Mass, *, in_place: bool) -> tuple[Tensor, Tensor]:
    """(out', lse') of the epilogue; out (..., S, D) bf16, fp16 or fp32, lse (..., S) float32."""
    if out.dim() != 4:
        assert not in_place, "only remask() has other than four dimensions, and it does not work in place"
        heads = out.shape[-3] if out.dim() > 2 else 1  # a sink's value is one per head
        flat_out, flat_lse = out.reshape(-1, heads, *out.shape[-2:]), lse.reshape(-1, heads, lse.shape[-1])
        tables = mass.table(out.shape[-2], lse.dtype), mass.sink_HS
        log_mass, sink = [None if x is None else x.expand(lse.shape).reshape(flat_lse.shape) for x in tables]
        flat_mass = Mass(log_mass, sink_HS=sink, sink_value_HD=mass.sink_value_HD)
        new_out, new_lse = remask_op(flat_out, flat_lse, *flat_mass)
        return new_out.reshape(out.shape), new_lse.reshape(lse.shape)
    # Triton launches on the current device; compiled code guards for itself.
    with nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(out):
        if plain_eager() and type(out) is Tensor and not out.requires_grad:
            # Nobody watches the mutation, so no op has to declare it: going through one takes the host
            # several times the launch.
            new_out, new_lse = out if in_place else torch.empty_like(out), torch.empty_like(lse)
            _launch(remask_kernel, out, new_out, lse, new_lse, mass, in_place=in_place)
            return new_out, new_lse
        if in_place:
            return out, remask_in_place_op(out, lse, *mass)
        return remask_op(out, lse, *mass)


def block_shape(head_dim: int, itemsize: int) -> tuple[int, int]:
    """(ROWS, BLOCK_D) of a tile, which NUM_WARPS work on."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    return max(1, min(MAX_ROWS, TILE_BYTES // (block_d * itemsize))), block_d


def _launch(kernel: Any, out: Tensor, new_out: Tensor, lse: Tensor, new_lse: Tensor, mass: Mass, *, in_place: bool) -> None:
    batch, heads, num_rows, head_dim = out.shape
    head_dim = int(head_dim)  # a tile has a fixed size: under dynamic shapes the head dim becomes a constant here
    rows, block_d = block_shape(head_dim, out.element_size())
    source = CU_SEQLENS if mass.cu_seqlens is not None else ARANGE if mass.positions is None else POSITIONS
    table_strides = (0, 0, 0) if mass.log_mass_HS is None else mass.log_mass_HS.expand(lse.shape).stride()
    gamma_stride = 0 if mass.gamma is None or mass.gamma.dim() == 0 else mass.gamma.stride(0)
    position_strides = (0, 0) if mass.positions is None else mass.positions.expand(batch, num_rows).stride()
    # A 1 becomes a constant of the compiled kernel: without a value it has not one parameter more.
    sink_strides = (1, 1, 1) if mass.sink_HS is None else mass.sink_HS.expand(lse.shape).stride()
    value_strides = (1, 1) if mass.sink_value_HD is None else mass.sink_value_HD.expand(heads, head_dim).stride()
    tensors = (out, new_out, lse, new_lse, mass.log_mass_HS, mass.gamma, mass.positions, mass.cu_seqlens)
    tensors = (*tensors, mass.sink_HS, mass.sink_value_HD)
    sizes = (num_rows, heads, mass.length, 0 if mass.cu_seqlens is None else mass.cu_seqlens.shape[0] - 1)
    out_strides = (*out.stride(), *new_out.stride(), *lse.stride(), *new_lse.stride())
    tiles = triton.cdiv(num_rows, rows)
    layers = triton.cdiv(tiles, MAX_GRID)
    kernel[(batch * heads, triton.cdiv(tiles, layers), layers)](
        *tensors, *sizes, *out_strides, *table_strides, gamma_stride, *position_strides, *sink_strides, *value_strides,
        HEAD_DIM=head_dim, BLOCK_D=block_d, ROWS=rows, HALF_ULP=HALF_ULP[out.dtype],
        IN_PLACE=in_place, HAS_TABLE=mass.log_mass_HS is not None, POSITION=source,
        HAS_VALUE=mass.sink_value_HD is not None, num_warps=NUM_WARPS,
    )  # fmt: skip


def _reference(out: Tensor, lse: Tensor, mass: Mass) -> tuple[Tensor, Tensor]:
    share, new_lse = real_share_and_lse(lse, mass.table(out.shape[-2], lse.dtype))
    assert new_lse is not None
    if mass.sink_HS is None or mass.sink_value_HD is None:
        return times_share(out, share, lse), new_lse
    pseudo = exp_difference(mass.sink_HS, new_lse)
    wide = times_share(out.to(share.dtype), share, lse)
    return (wide + pseudo.unsqueeze(-1) * mass.sink_value_HD.unsqueeze(-2)).to(out.dtype), new_lse
