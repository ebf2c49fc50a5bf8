"""How the cost over plain causal attention grows with S: extra = a + b S + c S^2, on a CPU.

The extra of a round is StableMask's time less that of plain causal attention beside it. c has to be 0 within its
error: the quadratic part is causal's own. b, at the measured copy bandwidth, is a number of bytes per row and head,
beside what the epilogue reads and writes there by count.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.speed.cases import DTYPES, Case
from benchmarks.speed.check import error_of
from benchmarks.speed.timing import MODES, input_sets, rounds, train
from benchmarks.speed.variants import Setup, Variant, setup, variants

Row = dict[str, Any]
POINTS = 7
# A round that takes longer than this is forward alone; one whose forward does is not run.
LONGEST_ROUND = 20.0
PLAIN, OURS = "cpu, plain", "cpu, StableMask"
FIT = ("a us", "b ns", "bytes per row", "by count", "at least", "c of causal's", "its error", "c in its errors")


def growth_rows(case: Case, device: torch.device, copy_gbps: float, seconds: float) -> list[Row]:
    """A row for each S, then one with the fit of each mode."""
    rows: list[Row] = []
    round_seconds = 0.0
    for length in (case.length >> k for k in reversed(range(POINTS))):
        # Both passes, fourfold from one S to the next; forward alone is less than a third.
        expected = 4 * round_seconds
        row: Row = {"variant": "StableMask less plain causal", "length": length}
        if expected / 3 > LONGEST_ROUND:
            rows.append(row | {"why": f"not run: a round forward alone would take {expected / 3:.0f} s"})
            continue
        at = setup(case._replace(length=length), device)
        made = {name: v._replace(backward=expected <= LONGEST_ROUND) for name, v in variants(at).items() if name in (PLAIN, OURS)}
        found, round_seconds = _compare(at, made, seconds / POINTS)
        if expected > LONGEST_ROUND:
            round_seconds *= 3
        rows.append(row | found)
    return rows + fits(rows, case, copy_gbps)


def _compare(at: Setup, made: dict[str, Variant], seconds: float) -> tuple[Row, float]:
    """The row, and how long a round took. What is long runs once or twice; its error_of is its warm-up."""
    case, device = at.case, at.device
    sets = input_sets(case.batch, case.length, (case.heads, case.kv_heads), case.head_dim, DTYPES[case.dtype], device)
    begin = time.perf_counter()
    error = error_of(made[OURS], at, sets[0])
    if time.perf_counter() - begin < 1:
        train(made[PLAIN].call, sets[0], device, made[PLAIN].backward)
    least = 5 if (took := time.perf_counter() - begin) < 1 else 2 if took < LONGEST_ROUND / 2 else 1
    forward_only = () if made[OURS].backward else tuple(made)
    begin = time.perf_counter()
    times, errors = rounds({name: v.call for name, v in made.items()}, sets, device, seconds, least, forward_only)
    if errors:
        return {"error": "; ".join(errors.values())}, 0.0
    taken = time.perf_counter() - begin
    modes = [mode for mode in MODES if mode in times[OURS]]
    extra = {m: report.median_and_fifths([a - b for a, b in zip(times[OURS][m], times[PLAIN][m], strict=True)]) for m in modes}
    plain = {m: report.median_and_fifths(times[PLAIN][m]) for m in modes}
    return {"check": error, "extra ms": extra, "plain ms": plain}, taken / extra[MODES[0]]["rounds"]


def fits(rows: Sequence[Row], case: Case, copy_gbps: float) -> list[Row]:
    found: list[Row] = []
    for mode in (MODES[0], MODES[2]):
        points = [row for row in rows if mode in row.get("extra ms", {})]
        if len(points) < 5:
            continue
        values = fit(
            [row["length"] for row in points],
            [row["extra ms"][mode] for row in points],
            [row["plain ms"][mode] for row in points],
        )
        per_row = values["b ns"] * copy_gbps / case.heads
        size = DTYPES[case.dtype].itemsize
        values |= {"bytes per row": per_row, "by count": row_bytes(case.head_dim, size), "at least": 2 * case.head_dim * size + 8}
        found.append({"variant": f"fit, {mode}", "role": "fit", "mode": mode, "values": values})
    return found


def fit(lengths: Sequence[int], extra: Sequence[dict[str, float]], plain: Sequence[dict[str, float]]) -> dict[str, float]:
    """Weighted least squares of extra = a + b S + c S^2, in ms, and c over the quadratic part of plain's own.

    A point's error is what times of this machine vary by, the same part of plain's time everywhere, over the
    root of its rounds. A fit that is worse than that widens the errors. Where c is 0 within two of its errors,
    a and b are those of the line without it, which are known better.
    """
    s = np.array(lengths, dtype=float)
    varied = [(x["p80"] - x["p20"]) / 2 / p["median"] for x, p in zip(extra, plain, strict=True) if x["rounds"] > 2]
    part = max(float(np.median(varied)) if varied else 0.0, 1e-3)
    sigma = np.array([part * p["median"] / p["rounds"] ** 0.5 for p in plain])
    basis = np.stack([s**0, s, s**2], axis=1)

    def solve(y: Sequence[float], terms: int = 3) -> tuple[np.ndarray, np.ndarray]:
        weighted, wanted = basis[:, :terms] / sigma[:, None], np.array(y) / sigma
        scale = np.linalg.norm(weighted, axis=0)
        inverse = np.linalg.pinv(weighted / scale)
        solution = inverse @ wanted / scale
        left = wanted - weighted @ solution
        widening = max(1.0, float(left @ left) / (len(s) - terms))
        return solution, np.sqrt(np.diag(inverse @ inverse.T) * widening) / scale

    y = [x["median"] for x in extra]
    (a, b, c), (_, b_error, c_error) = solve(y)
    line = 0.0 if abs(c) <= 2 * c_error else c
    if not line:
        (a, b), (_, b_error) = solve(y, terms=2)
    (_, _, own), _ = solve([p["median"] for p in plain])
    found = {
        "a us": 1e3 * a, "b ns": 1e6 * b, "b error": 1e6 * b_error, "a ms": a, "b ms": b, "c ms": line,
        "c of causal's": c / own, "its error": c_error / abs(own), "c in its errors": abs(c) / c_error,
    }  # fmt: skip
    return {key: float(value) for key, value in found.items()}


def row_bytes(head_dim: int, size: int) -> int:
    """What the ops of the epilogue read and write in a row of a head, in turn.

    lse - log M reads two numbers of 4 bytes and writes one, its sigmoid one each, logaddexp(lse, log M) as the
    first; the share is cast to out's dtype where that is another, and out is read and written with it.
    """
    cast = 4 + size if size != 4 else 0
    return 12 + 8 + 12 + cast + size + 2 * head_dim * size
