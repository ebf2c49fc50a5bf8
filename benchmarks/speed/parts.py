"""Parts that benchmarks.speed measures: the epilogue alone, the first compiled call."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import report
from benchmarks.speed.cases import DTYPES, Case
from benchmarks.speed.timing import ratio, turns
from sm_flex import headwise_gamma, log_mass, stablemask
from sm_flex.epilogue.remask import epilogue

Row = dict[str, Any]
# 1 - s at or above this can change a number of the dtype, a quarter of its eps (DESIGN: half the gap below a power of two).
QUARTER_EPS = {torch.bfloat16: 2.0**-9, torch.float32: 2.0**-25}


def epilogue_rows(case: Case, device: torch.device, copy_gbps: float, seconds: float) -> list[Row]:
    """The remask in place on an engine's buffers, gamma 0 and head-wise: bytes that it must move, per time.

    Every row's lse is read and lse' written, 4 bytes each. On a GPU out is read and written in the tiles of
    rows where some share changes it, elsewhere everywhere. lse is that of scores with deviation 1: log(p + 1)
    + 1/2.
    """
    dtype = DTYPES[case.dtype]
    shape = (case.batch, case.length, case.heads, case.head_dim)
    lse = ((torch.arange(case.length, device=device) + 1.0).log() + 0.5).expand(case.batch, case.heads, -1).contiguous()
    # In (B, S, H, D) memory, as flash leaves it; two, each far beyond the L2 cache on a GPU.
    outs = [torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(2)]
    gammas = {"headwise": headwise_gamma(case.heads).to(device), "zero": torch.zeros(case.heads, device=device)}
    calls: dict[str, Callable[[int], Any]] = {}
    errors = {}
    for name, gamma in gammas.items():
        mass = stablemask(gamma, length=case.length).mass(device, case.length, case.length, torch.float32)
        share = torch.sigmoid(lse - log_mass(gamma, torch.arange(case.length, device=device), case.length))
        found, _ = epilogue(outs[0].clone(), lse, mass, in_place=True)
        exact = outs[0].double() * share.double().unsqueeze(-1)
        errors[name] = float((found.double() - exact).abs().max() / exact.abs().max())
        del found, exact
        calls[name] = lambda i, mass=mass: epilogue(outs[i % 2], lse, mass, in_place=True)
    times = turns(calls, device, seconds)
    rows: list[Row] = []
    for name, gamma in gammas.items():
        touched = _touched(lse, gamma, case, dtype, device)
        moved = lse.numel() * 8 + touched * 2 * outs[0].numel() * dtype.itemsize
        ms = report.median_and_fifths(times[name])
        gbps = moved / ms["median"] / 1e6
        values = {"touched": touched, "bytes": moved, "GB/s": gbps, "of copy bandwidth": gbps / copy_gbps}
        if name == "headwise":
            values["of gamma 0's time"] = ratio(times[name], times["zero"])["median"]
        row = {"variant": f"epilogue, {name}", "gamma": name, "ms": {"forward": ms}, "values": values}
        rows.append(row | ({"check": errors[name]} if errors[name] < 2**-7 else {"error": f"wrong by {errors[name]:.2e}"}))
    return rows


def _touched(lse: Tensor, gamma: Tensor, case: Case, dtype: torch.dtype, device: torch.device) -> float:
    """The fraction of out that has to be read and written."""
    if device.type != "cuda":
        return 1.0
    from sm_flex.epilogue.kernel import block_shape

    tile, _ = block_shape(case.head_dim, dtype.itemsize)
    share = torch.sigmoid(lse[0].double() - log_mass(gamma.double(), torch.arange(case.length, device=device), case.length))
    changed = (1 - share) >= QUARTER_EPS[dtype]
    padded = F.pad(changed, (0, -case.length % tile))
    return float(padded.unflatten(-1, (-1, tile)).any(-1).double().mean())


FIRST_CALL = """
import json, sys, time, torch
from sm_flex import headwise_gamma, scaled_dot_product_attention, stablemask
device, heads, length, dim, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), getattr(torch, sys.argv[5])
q, k, v = [torch.randn(1, heads, length, dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
mask = stablemask(headwise_gamma(heads).to(device), length=length)
def ours(q, k, v): return scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=mask)
def plain(q, k, v): return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
call = torch.compile(plain if sys.argv[6] == "plain" else ours, fullgraph=True)
start = time.perf_counter()
call(q, k, v).sum().backward()
if device == "cuda": torch.cuda.synchronize()
print(json.dumps(time.perf_counter() - start))
"""


def first_call_rows(case: Case, device: torch.device) -> list[Row]:
    """Seconds of the first compiled forward and backward pass, in a new process without caches."""
    rows: list[Row] = []
    path = os.pathsep.join([str(report.ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "PYTHONPATH": path}
    dtype = str(DTYPES[case.dtype]).removeprefix("torch.")
    for what in ("plain", "StableMask"):
        options = [device.type, str(case.heads), str(case.length), str(case.head_dim), dtype, what]
        command = [sys.executable, "-c", FIRST_CALL, *options]
        row: Row = {"variant": f"first compiled call, {what}", "role": what}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
            row["values"] = {"seconds": json.loads(done.stdout.splitlines()[-1])}
        except subprocess.CalledProcessError as error:
            row["error"] = (error.stderr.strip().splitlines() or ["no message"])[-1][:200]
        except subprocess.TimeoutExpired:
            row["error"] = "took over 120 s"
        rows.append(row)
    return rows
