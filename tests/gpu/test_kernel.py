"""The Triton kernel on a GPU against the plain formula: layouts, positions, one launch, and what it may leave alone."""

import math

import pytest
import torch
from torch import Tensor

from sm_flex.epilogue.formula import real_share_and_lse
from sm_flex.mass.table import Mass
from sm_flex.testing import assert_within_error_budget
from tests.helpers.gpu import DEVICE, name_of

pytest.importorskip("triton", reason="this torch has no Triton (a CPU build)")

from sm_flex.epilogue.kernel import HALF_ULP, block_shape, launch
from tests.helpers.remask_kernel import assert_right_with_value, with_sink

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
BATCH, HEADS, ROWS = 2, 3, 263

MASSES = {
    "a number": lambda: Mass(None, torch.tensor(0.05, dtype=torch.float64), None, None, ROWS + 7),
    "one per head": lambda: Mass(None, torch.tensor([0.0, 2**-8, 0.9]), None, None, ROWS),
    "shorter than the rows": lambda: Mass(None, torch.tensor([0.0, 2**-8, 0.9]), None, None, 101),
    "positions (S,)": lambda: Mass(None, torch.tensor([0.1, 0.3, 0.5]), torch.randint(0, 400, (ROWS,)), None, 200),
    "positions (B, S)": lambda: Mass(None, torch.tensor(0.1), torch.randint(0, 400, (BATCH, ROWS)).int(), None, 200),
    "every other position": lambda: Mass(None, torch.tensor(0.1), torch.arange(2 * ROWS)[::2], None, 400),
    "documents": lambda: Mass(None, torch.tensor(0.1), None, torch.tensor([0, 0, 87, 131, 131, ROWS]).int(), ROWS + 1),
    "one document": lambda: Mass(None, torch.tensor(0.1), None, torch.tensor([0, ROWS]), ROWS),
    "a value": lambda: with_value(torch.randn(HEADS, 1).expand(HEADS, ROWS)),
    "a value of each row": lambda: with_value(torch.randn(BATCH, HEADS, ROWS)),
}


def with_value(sink: Tensor, dim: int = 64) -> Mass:
    """A sink with a value beside a mass, none in the last head."""
    sink = sink.clone()
    sink[..., -1, :] = -math.inf
    return with_sink(torch.randn(1, ROWS), sink, torch.randn(HEADS, dim))


def mass_of(name: str) -> Mass:
    mass = MASSES[name]()
    return Mass(*(x.to(DEVICE) if isinstance(x, Tensor) else x for x in mass))  # pyright: ignore


def problem(dim: int, dtype: torch.dtype, layout: str = "BSHD") -> tuple[Tensor, Tensor]:
    """(B, H, S, D) out in the memory order of layout, "wide" as the first columns of a wider buffer; one fully masked row."""
    width = dim + 8 if layout == "wide" else dim
    if layout == "BHSD":
        out = torch.randn(BATCH, HEADS, ROWS, width, device=DEVICE).to(dtype)
    else:
        out = torch.randn(BATCH, ROWS, HEADS, width, device=DEVICE).to(dtype).transpose(1, 2)
    lse = 2 * torch.randn(BATCH, ROWS, HEADS, device=DEVICE).transpose(1, 2)
    lse = lse if layout == "BSHD" else lse.contiguous()
    lse[0, 1, ROWS // 2] = -math.inf
    return out[..., :dim], lse


def same_strides(x: Tensor) -> Tensor:
    """A copy with x's strides, gaps included."""
    buffer = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return buffer.copy_(x)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(BITS[x.dtype])


def assert_right(out: Tensor, lse: Tensor, mass: Mass, new_out: Tensor, new_lse: Tensor) -> None:
    """new_out and new_lse against the formula in float64, with the error of the formula in the dtype as the yardstick."""
    if mass.sink_value_HD is not None:
        assert_right_with_value(out, lse, mass, new_out, new_lse)
        return

    def formula(dtype: torch.dtype, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        log_mass = mass.table(lse.shape[-1], dtype).to(dtype)
        share, log_sum = real_share_and_lse(lse.to(dtype), log_mass)
        assert log_sum is not None
        return out.to(out_dtype) * share.unsqueeze(-1).to(out_dtype), log_sum

    reference, reference_lse = formula(torch.float64, torch.float64)
    plain, plain_lse = formula(torch.float32, out.dtype)
    assert_within_error_budget(new_out, reference, plain, "out", lse=reference_lse)
    assert_within_error_budget(new_lse, reference_lse, plain_lse, "lse", lse=reference_lse)


def both_ways(out: Tensor, lse: Tensor, mass: Mass) -> tuple[Tensor, Tensor]:
    """launch out of place, and in place on a copy with the same strides, which must not differ by a bit."""
    kept = same_strides(out), same_strides(lse)
    new_out, new_lse = launch(out, lse, mass, in_place=False)
    assert torch.equal(bits(out), bits(kept[0]))
    target = same_strides(out)
    written, written_lse = launch(target, lse, mass, in_place=True)
    assert written.data_ptr() == target.data_ptr()
    assert torch.equal(bits(written), bits(new_out))
    assert torch.equal(written_lse, new_lse)
    assert torch.equal(lse, kept[1])
    return new_out, new_lse


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", MASSES)
def test_log_mass_inside(name: str, dtype: torch.dtype):
    out, lse = problem(64, dtype)
    mass = mass_of(name)
    assert_right(out, lse, mass, *both_ways(out, lse, mass))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("layout", ["BHSD", "BSHD", "wide"])
@pytest.mark.parametrize("dim", [1, 40, 256])
@pytest.mark.parametrize("value", [False, True])
def test_layouts_and_head_dims(layout: str, dim: int, value: bool, dtype: torch.dtype):
    out, lse = problem(dim, dtype, layout)
    mass = with_value(torch.randn(HEADS, 1), dim) if value else mass_of("one per head")
    assert_right(out, lse, mass, *both_ways(out, lse, mass))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(1, ROWS), (HEADS, ROWS), (BATCH, 1, ROWS), (BATCH, HEADS, ROWS)])
def test_log_mass_from_a_table(shape: tuple[int, ...], dtype: torch.dtype):
    out, lse = problem(64, dtype)
    table = torch.randn(shape, device=DEVICE)
    table[..., 5] = -math.inf
    assert_right(out, lse, Mass(table), *both_ways(out, lse, Mass(table)))


@pytest.mark.card("a profile of CUDA")
@pytest.mark.parametrize("name", ["a number", "positions (B, S)", "documents", "a value"])
@pytest.mark.parametrize("in_place", [True, False])
def test_one_launch(name: str, in_place: bool):
    out, lse = problem(64, torch.bfloat16)
    mass = mass_of(name)
    launch(out, lse, mass, in_place=in_place)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        launch(out, lse, mass, in_place=in_place)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() or () if event.device_type.name == "CUDA"]
    assert len(kernels) == 1
    assert "remask_kernel" in kernels[0]


def lse_around_the_bound(dtype: torch.dtype) -> list[float]:
    """At log M = 0: lse a few ulp either side of 1 - s = half an ulp of the dtype, and far to both sides."""
    centre = torch.tensor(math.log(1 / HALF_ULP[dtype] - 1), dtype=torch.float32)
    near = [centre]
    for direction in (-math.inf, math.inf):
        x = centre
        for _ in range(24):
            x = torch.nextafter(x, torch.tensor(direction))
            near.append(x)
    return [x.item() for x in (*near, centre - 1, centre + 1, centre + 60)]


def values_of(dtype: torch.dtype) -> Tensor:
    """Powers of two (half the gap below them), their neighbours, subnormals, the largest and zero, of both signs: (32,)."""
    info = torch.finfo(dtype)
    one = torch.ones((), dtype=dtype)
    tiny = torch.tensor(info.smallest_normal, dtype=dtype)
    neighbours = torch.stack([torch.nextafter(x, y * one) for x in (one, 2 * one, tiny) for y in (0.0, 8.0)])
    subnormal = tiny * info.eps * torch.tensor([0.0, 1.0, 5.0], dtype=dtype)
    powers = torch.tensor([2.0**e for e in (-8, -1, 0, 1, 15)], dtype=dtype)
    values = torch.cat([powers, neighbours, subnormal, torch.tensor([info.max, info.smallest_normal]).to(dtype)])
    return torch.cat([values, -values])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_skipping_changes_no_bit(dtype: torch.dtype):
    """Whole tiles of one lse near the bound, and again with one row that wakes each: in place skips, out of place never."""
    values = values_of(dtype)
    rows, _ = block_shape(values.numel(), dtype.itemsize)
    lse = torch.tensor(lse_around_the_bound(dtype), device=DEVICE).repeat_interleave(rows)
    awake = lse.clone()
    awake[rows // 3 :: rows] = 0.0
    lse = torch.stack([lse, awake]).unsqueeze(0)
    out = values.to(DEVICE).expand(1, 2, lse.shape[-1], -1).contiguous()
    table = torch.zeros(1, lse.shape[-1], device=DEVICE)
    new_out, _ = both_ways(out, lse, Mass(table))
    changed = (bits(new_out) != bits(out)).any(-1)
    # Far below the bound rows change, far above it none does, and a row with s = 1/2 does.
    far = slice(-3 * rows, -2 * rows), slice(-2 * rows, None)
    assert changed[0, 0, far[0]].all()
    assert not changed[0, 0, far[1]].any()
    assert changed[0, 1, rows // 3 :: rows].all()


@pytest.mark.card("a CPU keeps the payload of a NaN")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_saturated_tiles_are_not_written(dtype: torch.dtype):
    """A NaN with a payload: multiplied and stored it becomes the canonical NaN, so that bits that stay were never written.

    One row with s = 1/2 wakes its own tile and no other.
    """
    rows, _ = block_shape(64, dtype.itemsize)
    total = 4 * rows
    # The canonical NaN of a GPU has all bits of the mantissa set; this one has the quiet bit and the last.
    payload = {torch.bfloat16: 0x7FC1, torch.float16: 0x7E01, torch.float32: 0x7FC00001}[dtype]
    out = torch.full((1, 1, total, 64), payload, dtype=BITS[dtype], device=DEVICE).view(dtype)
    kept = bits(out).clone()
    lse = torch.full((1, 1, total), 60.0, device=DEVICE)
    table = torch.zeros(1, total, device=DEVICE)
    computed, _ = launch(out, lse, Mass(table), in_place=False)
    assert computed.isnan().all()
    assert (bits(computed) != kept).all(), "a product keeps the payload on this GPU: the test below would show nothing"

    _, new_lse = launch(out, lse, Mass(table), in_place=True)
    assert torch.equal(bits(out), kept)
    assert torch.equal(new_lse, lse)

    lse[0, 0, 2 * rows + 3] = 0.0
    _, new_lse = launch(out, lse, Mass(table), in_place=True)
    written = (bits(out) != kept).all(-1)[0, 0]
    assert written[2 * rows : 3 * rows].all()
    assert written.sum() == rows
    assert new_lse[0, 0, 2 * rows + 3].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_row_of_zeros_takes_its_share_of_the_value_however_large_s_is(dtype: torch.dtype):
    """s leaves the rows as they are, but for the sink's share of them, which is 0 in float32 in the last tile alone."""
    rows, _ = block_shape(64, dtype.itemsize)
    out = torch.zeros(1, 1, 3 * rows, 64, dtype=dtype, device=DEVICE)
    lse = torch.full((1, 1, 3 * rows), math.log(4 / HALF_ULP[dtype]), device=DEVICE)
    sink = torch.zeros(1, 3 * rows)
    sink[:, 2 * rows :] = -150.0
    mass = with_sink(torch.full((1, 1), -1.0), sink, 1 + torch.rand(1, 64))
    new_out, new_lse = both_ways(out, lse, mass)
    assert_right(out, lse, mass, new_out, new_lse)
    assert (new_out[:, :, : 2 * rows] != 0).all()
    assert (new_out[:, :, 2 * rows :] == 0).all()


OPS_ARGS = {
    "table": lambda: (torch.zeros(1, 17), None, None, None, 0),
    "number": lambda: (None, torch.tensor(0.3, dtype=torch.float64), None, None, 20),
    "positions": lambda: (None, torch.tensor([0.3, 0.1, 0.0]), torch.arange(17), None, 20),
    "documents": lambda: (None, torch.tensor([0.3, 0.1, 0.0]), None, torch.tensor([0, 4, 17]).int(), 20),
    "value": lambda: (torch.ones(3, 17), None, None, None, 0, torch.zeros(3, 1), torch.randn(3, 8)),
}


@pytest.mark.parametrize("args", OPS_ARGS)
@pytest.mark.parametrize("op", ["remask", "remask_"])
def test_opcheck(op: str, args: str):
    out = torch.randn(2, 3, 17, 8, device=DEVICE, dtype=torch.bfloat16)
    lse = torch.randn(2, 3, 17, device=DEVICE)
    rest = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in OPS_ARGS[args]()]
    torch.library.opcheck(getattr(torch.ops.sm_flex, op).default, (out, lse, *rest))
