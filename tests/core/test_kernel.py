"""The Triton kernel, in Triton's interpreter where there is no GPU, against the plain formula; and its two ops."""

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="this torch has no Triton (a CPU build)")

from sm_flex.epilogue import kernel as rk
from sm_flex.epilogue.formula import real_share_and_lse
from sm_flex.mass.table import Mass
from tests.helpers.remask_kernel import DEVICE, assert_right_with_value, check, launch, problem, with_sink
from tests.helpers.triton_rounding import exact_bf16

# The interpreter computes both sides of a where() in numpy, which warns of inf - inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF = math.inf
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _rounding_of_a_gpu() -> Iterator[None]:
    with exact_bf16():
        yield


MASSES = {
    "a number": lambda s: Mass(None, torch.tensor(0.5, dtype=torch.float64), None, None, s + 7),
    "one per head": lambda s: Mass(None, torch.tensor([0.0, 0.01, 2.0]), None, None, s),
    "extreme gammas": lambda s: Mass(None, torch.tensor([1e-8, INF, 1e4]), None, None, s + 100),
    "a little below 0": lambda s: Mass(None, torch.tensor([-1e-4, 0.3, 3e38]), None, None, max(1, s // 2)),
    "positions (S,)": lambda s: Mass(None, torch.tensor([0.1, 0.3, 0.5]), torch.randint(0, 400, (s,)), None, 200),
    "positions (B, S)": lambda s: Mass(None, torch.tensor(0.1), torch.randint(0, 400, (2, s)), None, 200),
    "documents": lambda s: Mass(
        None, torch.tensor(0.1), None, torch.tensor([0, 0, s // 3, s // 2, s // 2, s], dtype=torch.int32), s + 1
    ),
    "one document": lambda s: Mass(None, torch.tensor(0.1), None, torch.tensor([0, s]), s),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MASSES)
def test_log_mass_inside(name: str, dtype: torch.dtype, in_place: bool):
    for rows, dim in ((1, 8), (37, 24), (300, 64)):
        out, lse = problem(rows, dim, dtype)
        mass = MASSES[name](rows)
        mass = Mass(*(x.to(DEVICE) if isinstance(x, Tensor) else x for x in mass))  # pyright: ignore
        check(out, lse, mass, in_place)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", [(1, 67), (3, 67), (2, 3, 67), (2, 1, 67)])
def test_log_mass_from_a_table(shape: tuple[int, ...], in_place: bool):
    out, lse = problem(67, 40, torch.bfloat16)
    table = torch.randn(shape, device=DEVICE)
    table[..., 5] = -INF
    check(out, lse, Mass(table), in_place)


def test_nan_and_infinity_spread_and_no_further():
    out, lse = problem(37, 8, torch.float32)
    lse[0, 0, 3], lse[0, 0, 4], out[0, 0, 5, 0], out[0, 0, 6, 0] = math.nan, INF, math.nan, INF
    for in_place in (False, True):
        new_out, new_lse = launch(out, lse, Mass(torch.zeros(1, 37, device=DEVICE)), in_place)
        assert new_lse[0, 0, 3].isnan()
        assert new_out[0, 0, 3].isnan().all()
        assert new_lse[0, 0, 4] == INF
        assert new_out[0, 0, 5, 0].isnan()
        assert new_out[0, 0, 6, 0] == INF
        assert torch.isfinite(new_out).sum() == new_out.numel() - 8 - 2


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_a_fully_masked_row_goes_no_further(dtype: torch.dtype, in_place: bool):
    """Elsewhere NaN stays NaN, also where the share underflows to 0."""
    out, lse = problem(37, 24, dtype)
    lse[1, 2, 5] = -200.0
    out[0, 1, 37 // 2], out[1, 2, 5], out[1, 2, 6] = math.nan, math.nan, math.nan
    mass = Mass(torch.zeros(1, 37, device=DEVICE))
    new_out, new_lse = launch(out, lse, mass, in_place)
    assert new_lse[0, 1, 37 // 2] == 0.0
    assert (new_out[0, 1, 37 // 2] == 0).all()
    assert new_out[1, 2, 5:7].isnan().all()
    assert torch.isfinite(new_out).sum() == new_out.numel() - 2 * 24


def lse_around_the_bound(dtype: torch.dtype, log_m: float) -> Tensor:
    """lse a few ulp either side of 1 - s = half an ulp of the dtype, and far to both sides."""
    bound = rk.HALF_ULP[dtype]
    centre = torch.tensor(log_m + math.log((1 - bound) / bound), dtype=torch.float32)
    near = [centre]
    for direction in (-INF, INF):
        ulp = (torch.nextafter(centre, torch.tensor(direction)) - centre).item()
        near.extend(centre + n * ulp for n in (*range(1, 40), *(2**e for e in range(6, 18))))
    return torch.stack([*near, centre - 1, centre + 1, centre - 20, centre + 60])


def values_of(dtype: torch.dtype) -> Tensor:
    """Powers of two (half the gap below them), their neighbours, the smallest subnormals, odd mantissas, the largest."""
    info = torch.finfo(dtype)
    one = torch.ones((), dtype=dtype)
    tiny = torch.tensor(info.smallest_normal, dtype=dtype)
    neighbours = [torch.nextafter(x, y * one) for x in (one, 2 * one, tiny) for y in (0.0, 8.0)]
    subnormal = tiny * info.eps * torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=dtype)
    powers = torch.tensor([2.0**e for e in (-8, -1, 0, 1, 5, 15)], dtype=dtype)
    values = torch.cat([powers, torch.stack(neighbours), subnormal, torch.tensor([info.max, info.smallest_normal]).to(dtype)])
    return torch.cat([values, -values])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log_m", [0.0, -3.7, 5.1])
def test_a_skipped_row_would_not_have_changed(dtype: torch.dtype, log_m: float):
    """One row to a tile, as if every row were judged alone: rows left alone are those whose product rounds to themselves."""
    lse = lse_around_the_bound(dtype, log_m)
    out = values_of(dtype).expand(len(lse), -1).contiguous()
    share = 1 / (1 + torch.exp(torch.tensor(log_m) - lse))  # as the kernel computes it
    skipped = 1 - share < rk.HALF_ULP[dtype]
    rounded = (out.float() * share.unsqueeze(-1)).to(dtype)  # PyTorch rounds to nearest, as a GPU does
    assert skipped.any()
    assert not skipped.all()
    assert torch.equal(rounded[skipped], out[skipped])
    # The bound is tight: beyond it a power of two does change.
    beyond = 1 - share > rk.HALF_ULP[dtype]
    assert beyond.any()
    assert (rounded != out).any(-1)[beyond].all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_million_random_values_under_the_bound_stay(dtype: torch.dtype):
    out = torch.randn(1_000_000).to(dtype)
    largest = 1 - 2.0**-24  # the float32 below 1
    share = 1.0 if dtype == torch.float32 else 1 - rk.HALF_ULP[dtype] + (1 - largest)
    assert torch.equal((out.float() * share).to(dtype), out)


def test_saturated_tiles_are_not_written():
    """A NaN with a payload, which a tile that is written loses; 1 - s is a quarter of an ulp of bf16."""
    rows = 4 * rk.block_shape(32, 2)[0]
    out = torch.full((1, 1, rows, 32), 0x7FC1, dtype=torch.int16).view(torch.bfloat16).to(DEVICE)
    lse = torch.full((1, 1, rows), math.log(2**10 - 1), device=DEVICE)
    table = torch.zeros(1, rows, device=DEVICE)
    assert torch.equal(launch(out, lse, Mass(table), True)[0].view(torch.int16), out.view(torch.int16))
    assert (launch(out, lse, Mass(table), False)[0].view(torch.int16) != out.view(torch.int16)).all()


def test_bf16_is_rounded_to_nearest():
    """The product of 1.0 and a share between two bf16 numbers is the nearer of them."""
    share = 1 - torch.tensor([1, 3, 5, 7, 9]) / 1024  # steps of bf16 are 4 / 1024 here
    lse = torch.log(share / (1 - share)).reshape(1, 1, -1).to(DEVICE)
    out = torch.ones(1, 1, 5, 16, dtype=torch.bfloat16, device=DEVICE)
    new_out, _ = launch(out, lse, Mass(torch.zeros(1, 5, device=DEVICE)), False)
    assert torch.equal(new_out[0, 0, :, 0].cpu(), share.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_unsaturated_row_wakes_its_tile(dtype: torch.dtype):
    rows = 4 * rk.block_shape(32, dtype.itemsize)[0]
    out = torch.randn(1, 1, rows, 32).to(dtype).to(DEVICE)
    lse = torch.full((1, 1, rows), 60.0, device=DEVICE)
    wake = rows // 2 + 3
    lse[0, 0, wake] = 0.0
    new_out, new_lse = launch(out, lse, Mass(torch.zeros(1, rows, device=DEVICE)), True)
    others = torch.arange(rows, device=DEVICE) != wake
    assert torch.equal(new_out[:, :, others], out[:, :, others])
    torch.testing.assert_close(new_out[0, 0, wake].float(), out[0, 0, wake].float() / 2, rtol=1e-2, atol=0)
    assert torch.equal(new_lse[0, 0, others], lse[0, 0, others])
    assert new_lse[0, 0, wake].item() == pytest.approx(math.log(2))


OPS_ARGS = [
    (torch.zeros(1, 17), None, None, None, 0),
    (None, torch.tensor(0.3, dtype=torch.float64), None, None, 20),
    (None, torch.tensor([0.3, 0.1, 0.0]), torch.arange(17), None, 20),
    (None, torch.tensor([0.3, 0.1, 0.0]), None, torch.tensor([0, 4, 17], dtype=torch.int32), 20),
    (torch.ones(3, 17), None, None, None, 0, torch.zeros(3, 1).expand(3, 17), torch.randn(3, 8)),
]


@pytest.mark.parametrize("args", OPS_ARGS)
@pytest.mark.parametrize("op", ["remask", "remask_"])
def test_opcheck(op: str, args: tuple):
    out, lse = torch.randn(2, 3, 17, 8), torch.randn(2, 3, 17)
    torch.library.opcheck(getattr(torch.ops.sm_flex, op).default, (out, lse, *args))


def test_opcheck_of_packed_documents_on_a_cpu():
    import sm_flex.engines.varlen_cpu  # noqa: F401

    q, k, v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    for window, right in ((-1, 0), (2, 0), (2, 3), (-1, -1)):
        args = (q, k, v, cu, cu, window, right, 0.3)
        torch.library.opcheck(torch.ops.sm_flex.varlen_cpu.default, args)
        out, lse = torch.ops.sm_flex.varlen_cpu(*args)
        backward = (torch.randn_like(out), q, k, v, out, lse, cu, cu, window, right, 0.3)
        torch.library.opcheck(torch.ops.sm_flex.varlen_cpu_backward.default, backward)


def test_the_ops_are_the_plain_formula():
    out, lse = torch.randn(2, 3, 17, 8), torch.randn(2, 3, 17)
    mass = Mass(None, torch.tensor([0.3, 0.1, 0.0]), torch.arange(17), None, 20)
    share, expected = real_share_and_lse(lse, mass.table(17, torch.float32))
    new_out, new_lse = torch.ops.sm_flex.remask(out, lse, None, mass.gamma, mass.positions, None, 20)
    torch.testing.assert_close(new_out, out * share.unsqueeze(-1))
    torch.testing.assert_close(new_lse, expected)
    torch.testing.assert_close(torch.ops.sm_flex.remask_(out, lse, None, mass.gamma, mass.positions, None, 20), expected)
    torch.testing.assert_close(out, new_out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ops_are_the_plain_formula_with_a_value(dtype: torch.dtype):
    out, lse = problem(17, 8, dtype)
    out[0, 1, 17 // 2] = math.nan
    mass = with_sink(torch.zeros(1, 17), torch.randn(3, 1), torch.randn(3, 8))
    new_out, new_lse = torch.ops.sm_flex.remask(out, lse, *mass)
    assert_right_with_value(out, lse, mass, new_out, new_lse)
    torch.testing.assert_close(torch.ops.sm_flex.remask_(out, lse, *mass), new_lse)
    torch.testing.assert_close(out, new_out)


def test_compiles_for_a_gpu_without_one():
    """Ahead of time, in a process where Triton does not interpret: no spill, and instructions within their budget.

    More variants are in benchmarks.kernel_report.
    """
    script = (
        "import torch\n"
        "from benchmarks.kernel_report import cli, cubin, roof\n"
        "variants = [(90, torch.bfloat16, 128), (90, torch.float32, 128), (80, torch.bfloat16, 256), (100, torch.bfloat16, 64)]\n"
        "value = cubin.Variant(90, torch.bfloat16, 128, True, 'table', True)\n"
        "for variant in [*(cubin.Variant(*at, True, 'arange') for at in variants), value]:\n"
        "    found = cubin.compile_variant(variant)\n"
        "    assert cli.fault(variant, found) is None, (variant, found)\n"
        "    assert cli.fault(variant, found._replace(spilled=8)) == 'spills'\n"
        "    for worse in (found._replace(instructions=9999), found._replace(skipped=9999)):\n"
        "        assert cli.fault(variant, worse) == 'over budget'\n"
        "    print(variant, *roof.per_32_rows(variant, found))\n"
    )
    import os

    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env=env, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *_, value = [line.split() for line in done.stdout.splitlines()]
    assert int(first[-2]) <= 1400
    assert int(first[-1]) <= 400
    assert int(value[-2]) <= 1400
    assert int(value[-1]) <= 250
