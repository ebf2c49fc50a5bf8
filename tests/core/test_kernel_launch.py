"""How the Triton kernel is launched: past the ops where nothing is watched, and within the limits of a grid."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="this torch has no Triton (a CPU build)")

from sm_flex.epilogue import kernel as rk
from sm_flex.epilogue.formula import real_share_and_lse
from sm_flex.mass.table import Mass
from tests.helpers.remask_kernel import DEVICE, assert_right_with_value, check, problem, with_sink
from tests.helpers.triton_rounding import exact_bf16

# The interpreter computes both sides of a where() in numpy, which warns of inf - inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _rounding_of_a_gpu() -> Iterator[None]:
    with exact_bf16():
        yield


@pytest.mark.parametrize("in_place", [False, True])
def test_a_plain_eager_launch_goes_past_the_ops(in_place: bool, monkeypatch: pytest.MonkeyPatch):
    """The ops tell dispatch modes and tracers of the mutation; where there are none they only cost time."""
    called: list[str] = []
    for name in ("remask_op", "remask_in_place_op"):
        op = getattr(rk, name)
        monkeypatch.setattr(rk, name, lambda *args, name=name, op=op: called.append(name) or op(*args))
    out, lse = problem(37, 24, torch.float32)
    mass = Mass(None, torch.tensor([0.3, 0.1, 0.0]).to(DEVICE), None, None, 40)
    share, expected_lse = real_share_and_lse(lse, mass.table(37, torch.float32))
    kept = out.clone()
    new_out, new_lse = rk.launch(out, lse, mass, in_place=in_place)
    assert not called
    assert (new_out is out) == in_place
    assert in_place or torch.equal(out, kept)
    torch.testing.assert_close(new_out, kept * share.unsqueeze(-1))
    torch.testing.assert_close(new_lse, expected_lse)
    with FlopCounterMode(display=False):
        rk.launch(kept, lse, mass, in_place=in_place)
    assert called == ["remask_in_place_op" if in_place else "remask_op"]


class Launches:
    """Stands in for the kernel and notes each grid."""

    def __init__(self) -> None:
        self.grids: list[tuple[Any, Any, Any]] = []

    def __getitem__(self, grid: tuple[Any, Any, Any]) -> Callable[..., None]:
        self.grids.append(grid)
        return lambda *args, **constants: None


def test_the_shape_of_a_tile_is_never_symbolic(monkeypatch: pytest.MonkeyPatch):
    """Under dynamic shapes the head dim may be a symbol, whose next power of two sympy would not stop looking for."""
    shapes: list[tuple[int, int]] = []
    block_shape = rk.block_shape

    def of_a_number(head_dim: int, itemsize: int) -> tuple[int, int]:
        assert type(head_dim) is int
        shapes.append(block_shape(head_dim, itemsize))
        return shapes[-1]

    def launch(out: Tensor, lse: Tensor, table: Tensor) -> Tensor:
        assert isinstance(out.shape[3], torch.SymInt)
        rk._launch(Launches(), out, out, lse, lse, Mass(table), in_place=True)
        return lse

    monkeypatch.setattr(rk, "block_shape", of_a_number)
    make_fx(launch, tracing_mode="symbolic")(torch.empty(2, 3, 37, 24), torch.empty(2, 3, 37), torch.empty(1, 37))
    assert shapes == [block_shape(24, 4)]


@pytest.mark.parametrize("rows", [1, 65535 * 16, 65535 * 16 + 1, 2**20, 2**22 + 7])
def test_a_grid_within_the_limits_of_cuda(rows: int):
    """At head_dim 256 a tile has 16 rows, of which a second dimension alone would hold less than 2^20."""
    kernel = Launches()
    out, lse = torch.empty(1, 1, rows, 256, dtype=torch.bfloat16, device="meta"), torch.empty(1, 1, rows, device="meta")
    rk._launch(kernel, out, out, lse, lse, Mass(torch.empty(1, rows, device="meta")), in_place=True)
    ((x, y, z),) = kernel.grids
    assert x == 1
    assert max(y, z) <= 65535
    tiles = -(-rows // rk.block_shape(256, 2)[0])
    assert tiles <= y * z < tiles + z


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_rows_beyond_the_second_dimension_of_the_grid(limit: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rk, "MAX_GRID", limit)
    out, lse = problem(300, 64, torch.float32)
    check(out, lse, Mass(torch.randn(3, 300, device=DEVICE)), True)


@pytest.mark.parametrize("shape", [(5, 11, 24), (11, 24), (2, 5, 3, 11, 24)])
def test_other_than_four_dimensions(shape: tuple[int, ...]):
    """As remask() calls it: the value is the same whatever stands before heads, rows and columns."""
    out, lse = torch.randn(shape, device=DEVICE), torch.randn(shape[:-1], device=DEVICE)
    heads = shape[-3] if len(shape) > 2 else 1
    log_mass, sink = torch.randn(11), torch.randn(heads, 1) if len(shape) > 2 else torch.randn(11)
    mass = with_sink(log_mass, sink, torch.randn(heads, 24))
    found = out, lse, *rk.launch(out, lse, mass, in_place=False)
    out, lse, new_out, new_lse = [x.unsqueeze(0) for x in found] if len(shape) == 2 else found
    assert_right_with_value(out, lse, mass, new_out, new_lse)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_launch_with_a_value(in_place: bool):
    """Past the ops, and where a mode looks on through them: the same result."""
    out, lse = problem(37, 24, torch.float32)
    mass = with_sink(torch.zeros(1, 37), torch.randn(3, 1), torch.randn(3, 24))
    kept = out.clone()
    new_out, new_lse = rk.launch(out, lse, mass, in_place=in_place)
    assert (new_out is out) == in_place
    assert in_place or torch.equal(out, kept)
    assert_right_with_value(kept, lse, mass, new_out, new_lse)
    with FlopCounterMode(display=False):
        again, again_lse = rk.launch(kept, lse, mass, in_place=in_place)
    torch.testing.assert_close(again, new_out)
    torch.testing.assert_close(again_lse, new_lse)


def test_a_launch_without_a_value_has_no_parameter_more():
    """Its strides are 1, which Triton makes constants, and its pointers None: what is compiled is what was before."""
    given: list[tuple[Any, ...]] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **constants: given.append((args, constants))

    out, lse = torch.empty(2, 3, 37, 24), torch.empty(2, 3, 37)
    rk._launch(Kernel(), out, out, lse, lse, Mass(torch.empty(1, 37)), in_place=True)
    ((args, constants),) = given
    names = dict(zip(rk.remask_kernel.arg_names, args, strict=False)) | constants
    assert (names["sink_ptr"], names["value_ptr"], names["HAS_VALUE"]) == (None, None, False)
    assert [names[x] for x in ("sink_b", "sink_h", "sink_s", "value_h", "value_d")] == [1] * 5
