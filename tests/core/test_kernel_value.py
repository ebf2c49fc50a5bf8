"""The Triton kernel with a sink that carries a value, in Triton's interpreter where there is no GPU, against float64."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="this torch has no Triton (a CPU build)")

from sm_flex.epilogue import kernel as rk
from sm_flex.mass.closed_form import log_mass
from sm_flex.mass.gamma import headwise_gamma
from sm_flex.mass.table import Mass
from tests.helpers.remask_kernel import DEVICE, assert_right_with_value, check_value, launch, problem, with_sink
from tests.helpers.triton_rounding import exact_bf16

# The interpreter computes both sides of a where() in numpy, which warns of inf - inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF = math.inf
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = 67
NO_MASS = torch.full((1, 1), -INF)


@pytest.fixture(autouse=True)
def _rounding_of_a_gpu() -> Iterator[None]:
    with exact_bf16():
        yield


def value_of(dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(3, dim)"""
    return torch.randn(3, dim).to(dtype)


def gamma_mass() -> Tensor:
    return log_mass(headwise_gamma(3), torch.arange(ROWS), ROWS + 5)


LEVELS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    # (log M without the sink, the sink's level)
    "one per head": lambda: (NO_MASS, torch.randn(3, 1).expand(3, ROWS)),
    "one per head, of one row": lambda: (NO_MASS, torch.randn(3, 1)),
    "beside gamma": lambda: (gamma_mass(), torch.randn(3, 1).expand(3, ROWS)),
    "(1, S)": lambda: (torch.randn(1, ROWS), torch.randn(1, ROWS)),
    "(B, 1, S)": lambda: (torch.randn(2, 3, ROWS), torch.randn(2, 1, ROWS)),
    "(B, H, S)": lambda: (torch.randn(1, ROWS), torch.randn(2, 3, ROWS)),
    "none in one head": lambda: (NO_MASS, torch.tensor([[0.3], [-INF], [2.0]])),
    "far apart": lambda: (torch.zeros(1, 1), torch.tensor([[-130.0], [-20.0], [30.0]])),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LEVELS)
def test_levels(name: str, dtype: torch.dtype, in_place: bool):
    out, lse = problem(ROWS, 40, dtype)
    check_value(out, lse, with_sink(*LEVELS[name](), value_of(40)), in_place)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 5, 64, 128, 256])
def test_head_dims(dim: int, dtype: torch.dtype, in_place: bool):
    out, lse = problem(11, dim, dtype)
    check_value(out, lse, with_sink(torch.zeros(1, 11), torch.randn(3, 11), value_of(dim)), in_place)


VALUES: dict[str, Callable[[], Tensor]] = {
    "float64": lambda: value_of(24, torch.float64),
    "bfloat16": lambda: value_of(24, torch.bfloat16),
    "one for all heads": lambda: torch.randn(1, 24).expand(3, 24),
    "every other head of more": lambda: torch.randn(6, 24)[::2],
    "every other column": lambda: torch.randn(3, 48)[:, ::2],
    "transposed": lambda: torch.randn(24, 3).t(),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", VALUES)
def test_values(name: str, in_place: bool):
    out, lse = problem(11, 24, torch.bfloat16)
    check_value(out, lse, with_sink(NO_MASS, torch.randn(3, 1), VALUES[name]()), in_place)


@pytest.mark.parametrize("layout", ["BHSD", "wide"])
@pytest.mark.parametrize("in_place", [False, True])
def test_layouts(layout: str, in_place: bool):
    out, lse = problem(11, 24, torch.float16)
    out = torch.cat([out, out], -1)[..., 8:32] if layout == "wide" else out.contiguous()
    check_value(out, lse.contiguous(), with_sink(NO_MASS, torch.randn(3, 1), value_of(24)), in_place)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_level_of_minus_infinity_is_no_sink(dtype: torch.dtype, in_place: bool):
    """Beside a mass, and with none: (out', lse') of the kernel without a value, bit for bit, fully masked rows too."""
    out, lse = problem(11, 24, dtype)
    out[0, 1, 5] = math.nan
    table = torch.randn(3, 11).to(DEVICE)
    table[2] = -INF
    mass = Mass(table, sink_HS=torch.full((1, 1), -INF).to(DEVICE), sink_value_HD=value_of(24).to(DEVICE))
    for actual, expected in zip(launch(out, lse, mass, in_place), launch(out, lse, Mass(table), in_place), strict=True):
        assert torch.equal(actual, expected)
        assert not actual.isnan().any()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fully_masked_rows_are_the_value(dtype: torch.dtype, in_place: bool):
    """Where the sink is all the mass they have; half of it where it is half; 0 where there is none. Their NaN is not read."""
    out, lse = problem(11, 24, dtype)
    out, lse = torch.full_like(out, math.nan), torch.full_like(lse, -INF)
    level = torch.tensor([[1.7], [1.7], [-INF]])
    value = value_of(24, dtype)
    mass = with_sink(torch.tensor([[-INF], [1.7], [-INF]]), level, value)
    new_out, new_lse = launch(out, lse, mass, in_place)
    expected = value.to(DEVICE) * torch.tensor([[1.0], [0.5], [0.0]], device=DEVICE).to(dtype)
    torch.testing.assert_close(new_out, expected[:, None, :].expand(new_out.shape), rtol=3e-6, atol=0.0)
    assert torch.equal(new_out[:, 0], expected[0].expand(2, 11, 24))
    assert (new_lse[:, 2] == -INF).all()
    assert_right_with_value(out, lse, mass, new_out, new_lse)


def test_nan_and_infinity_spread_and_no_further():
    out, lse = problem(11, 24, torch.float32)
    lse[0, 0, 3], lse[0, 0, 4], out[0, 0, 5, 0], out[0, 0, 6, 0] = math.nan, INF, math.nan, INF
    value = value_of(24)
    value[2, 7] = math.nan
    for in_place in (False, True):
        new_out, new_lse = launch(out, lse, with_sink(NO_MASS, torch.zeros(3, 1), value), in_place)
        assert new_out[0, 0, 3].isnan().all()
        assert new_lse[0, 0, 3].isnan()
        assert torch.equal(new_out[0, 0, 4], out[0, 0, 4])
        assert new_out[0, 0, 5, 0].isnan()
        assert new_out[0, 0, 6, 0] == INF
        assert new_out[:, 2, :, 7].isnan().all()
        assert torch.isfinite(new_out).sum() == new_out.numel() - 24 - 2 - 2 * 11


def half_saturated(dtype: torch.dtype) -> tuple[Tensor, Tensor, Mass]:
    """A tile whose rows s leaves as they are, and out is 0 there; then one like any other."""
    rows, _ = rk.block_shape(64, dtype.itemsize)
    out, lse = problem(2 * rows, 64, dtype)
    out[:, :, :rows], lse[:, :, :rows] = 0.0, math.log(4 / rk.HALF_ULP[dtype])
    return out, lse, with_sink(torch.full((1, 1), -2.0), torch.tensor([[-0.3], [-0.2], [-0.1]]), value_of(64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_takes_its_share_of_the_value_however_large_s_is(dtype: torch.dtype):
    out, lse, mass = half_saturated(dtype)
    check_value(out, lse, mass, True)
    rows, _ = rk.block_shape(64, dtype.itemsize)
    new_out, _ = launch(out, lse, mass, True)
    assert (new_out[:, :, :rows] != 0).all()
    # As small as a bfloat16 can be.
    new_out, _ = launch(torch.zeros_like(out).bfloat16(), lse.fill_(80.0), mass, True)
    assert (new_out != 0).all()


@pytest.mark.parametrize("level", [-INF, -200.0])
def test_tiles_without_any_share_of_the_value_are_not_written(level: float):
    """A NaN with a payload, which a tile that is written loses; the sink's share is 0 in float32, but for one row."""
    rows, _ = rk.block_shape(32, 2)
    out = torch.full((1, 1, 4 * rows, 32), 0x7FC1, dtype=torch.int16).view(torch.bfloat16).to(DEVICE)
    lse = torch.full((1, 1, 4 * rows), math.log(2**10 - 1), device=DEVICE)
    sink = torch.full((1, 4 * rows), level)
    sink[0, 2 * rows + 3] = -60.0
    mass = with_sink(torch.zeros(1, 4 * rows), sink, torch.ones(1, 32))
    written = (launch(out, lse, mass, True)[0].view(torch.int16) != out.view(torch.int16)).all(-1)[0, 0]
    assert written[2 * rows : 3 * rows].all()
    assert written.sum() == rows


PRODUCT = "out.to(tl.float32) * tl.where(masked, 0.0, share)[:, None]"
FAULTS = {
    "skipped by s alone": ("touched = touched | (pseudo != 0.0)", "touched = touched"),
    "a share too small for the dtype skipped": ("(pseudo != 0.0)", "(pseudo >= HALF_ULP)"),
    "another head's value": ("value_ptr + head * value_h", "value_ptr + (num_heads - 1 - head) * value_h"),
    "the value not scaled": ("pseudo[:, None] * value", "(0.0 * pseudo + 1.0)[:, None] * value"),
    "scaled by the share of the whole mass": ("tl.exp(sink - new_lse)", "tl.exp(log_m - new_lse)"),
    "scaled by the share before the sum": ("tl.exp(sink - new_lse)", "tl.exp(sink - lse)"),
    "the value scaled by s": ("pseudo[:, None] * value", "(pseudo * share)[:, None] * value"),
    "rounded before the sum": (f"new_out = {PRODUCT}", f"new_out = ({PRODUCT}).to(out.dtype).to(tl.float32)"),
}


def planted(name: str, folder: Path) -> ModuleType:
    """The module of the kernel with a fault, and its ops under another name."""
    text = Path(rk.__file__).read_text()
    old, new = FAULTS[name]
    assert text.count(old) == 1, f"{old} stands {text.count(old)} times in the kernel"
    text = text.replace(old, new).replace('"sm_flex::', f'"sm_flex_fault_{list(FAULTS).index(name)}::')
    path = folder / "faulty_kernel.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("faulty_kernel", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, tmp_path: Path):
    out, lse, mass = half_saturated(torch.bfloat16)
    module = planted(name, tmp_path)
    with pytest.raises(AssertionError, match="out: error"):
        check_value(out, lse, mass, True, module)
