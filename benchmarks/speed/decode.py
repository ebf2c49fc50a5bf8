"""A decode step of benchmarks.speed: one query against a cache of keys, without gradients.

On a CPU in a hot loop of calls, in turn: scaled_dot_product_attention, StableMask with the position of the call
before, StableMask with a new one in each call, and the floor of both: the bare op, and the epilogue's three ops. On
a GPU the first two, eager and replayed from a CUDA graph.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import report
from benchmarks.speed.cases import DTYPES, Case
from benchmarks.speed.timing import interleaved, one_line, ratio, turns
from sm_flex import StableMask, headwise_gamma, log_mass, scaled_dot_product_attention, stablemask
from sm_flex.runtime import cpu_flash_op
from sm_flex.testing import oracle

Row = dict[str, Any]
PLAIN, SAME, MOVING, FLOOR = "plain", "StableMask", "StableMask, a new position each step", "floor"
# A ratio is asked for from here on; below, three ops cost more than a tenth of the attention.
LONG_MS = 2.5
# Calls in a row are as many as take so long, but at least and at most so many.
LOOP_MS, LEAST_CALLS, MOST_CALLS = 10.0, 3, 40
# N: more positions than a case has calls.
TRAINED = 2**15
# Of the largest value.
TOLERANCE = 0.02


@torch.no_grad()
def decode_rows(case: Case, device: torch.device, seconds: float) -> list[Row]:
    dtype, length = DTYPES[case.dtype], case.length
    q = torch.randn(case.batch, case.heads, 1, case.head_dim, device=device, dtype=dtype)
    k, v = (torch.randn(case.batch, case.kv_heads, length, case.head_dim, device=device, dtype=dtype) for _ in range(2))
    gamma = headwise_gamma(case.heads).to(device)
    gqa = case.heads != case.kv_heads

    def mask_at(position: int) -> StableMask:
        return stablemask(gamma, length=TRAINED, positions=torch.tensor([position], device=device))

    here = mask_at(length - 1)
    table_H1 = log_mass(gamma, torch.tensor([length - 1], device=device), TRAINED)

    def plain(_: StableMask) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)

    def ours(mask: StableMask) -> Tensor:
        return scaled_dot_product_attention(q, k, v, enable_gqa=gqa, score_mod=mask)

    def floor(_: StableMask) -> Tensor:
        out, lse = cpu_flash_op(q, k, v, 0.0, False)
        return out.mul_((lse - table_H1).sigmoid().unsqueeze(-1).to(out.dtype))

    repeated = [x[:1].repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v)]

    def error_of(call: Callable[[StableMask], Tensor], position: int) -> float:
        exact, _ = oracle(q[:1], *repeated, gamma=gamma, length=TRAINED, positions=torch.tensor([position], device=device))
        error = float((call(mask_at(position))[:1].double() - exact).abs().max() / exact.abs().max())
        if not error <= TOLERANCE:
            raise ValueError(f"wrong: {error:.2e} of its largest value off eq. 11")
        return error

    if device.type == "cuda":
        return _on_a_gpu(lambda _: plain(here), lambda _: ours(here), error_of(ours, length - 1), seconds)
    errors = {SAME: error_of(ours, length - 1), MOVING: error_of(ours, length + 5), FLOOR: error_of(floor, length - 1)}
    newest = iter(range(length, TRAINED))
    masks = {name: (lambda: mask_at(next(newest))) if name == MOVING else (lambda: here) for name in (PLAIN, *errors)}
    return _rows(_hot_loops({PLAIN: plain, SAME: ours, MOVING: ours, FLOOR: floor}, masks, seconds), errors)


def _hot_loops(
    calls: dict[str, Callable[[StableMask], Any]], masks: dict[str, Callable[[], StableMask]], seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of one call, the mean over those of a loop; what they get is made before the loop begins."""
    device = torch.device("cpu")

    def loop(name: str, count: int) -> float:
        arguments = [masks[name]() for _ in range(count)]
        begin = report.now(device)
        for mask in arguments:
            calls[name](mask)
        return 1e3 * (report.now(device) - begin) / count

    for name in calls:
        loop(name, LEAST_CALLS)
    count = round(min(MOST_CALLS, max(LEAST_CALLS, LOOP_MS / loop(PLAIN, LEAST_CALLS))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _, names in interleaved(calls, seconds, 10, 200):
        for name in names:
            found[name].append(loop(name, count))
    return found


def _rows(times: dict[str, list[float]], errors: dict[str, float]) -> list[Row]:
    rows: list[Row] = []
    found = {name: report.median_and_fifths(ms) for name, ms in times.items()}
    for name, ms in found.items():
        row: Row = {"variant": f"decode, {name}", "engine": "hot loop", "role": name, "ms": {"forward": ms}}
        if name != PLAIN:
            over = ratio(times[name], times[PLAIN])
            row |= {"gamma": "headwise", "check": errors[name], "ratio": {"same engine": {"forward": over}}}
            row["values"] = {"us more than plain": _more(times[name], times[PLAIN])}
            if name in (SAME, MOVING):
                row["values"]["us more than the floor"] = _more(times[name], times[FLOOR])
            if name in (SAME, MOVING) and found[PLAIN]["median"] >= LONG_MS:
                row["values"]["of plain, which is long"] = over["median"]
            if name == MOVING:
                row["values"]["of repeated's p80"] = ms["median"] / found[SAME]["p80"]
        rows.append(row)
    return rows


def _more(ours: list[float], theirs: list[float]) -> float:
    """Microseconds, the median over loops of the same turn."""
    return 1e3 * report.median_and_fifths([a - b for a, b in zip(ours, theirs, strict=True)])["median"]


def _on_a_gpu(plain: Callable[[int], Any], ours: Callable[[int], Any], error: float, seconds: float) -> list[Row]:
    device = torch.device("cuda")
    rows = _pair("eager, wall clock", turns({"plain": plain, "ours": ours}, device, seconds / 2, wall=True), error)
    try:
        graphs = {"plain": _graph(plain), "ours": _graph(ours)}
        times = turns({name: lambda _, g=g: g.replay() for name, g in graphs.items()}, device, seconds / 2)
        rows += _pair("CUDA graph", times, error)
    except Exception as problem:  # an error is a row of the result
        rows.append({"variant": "decode, CUDA graph", "error": one_line(problem)})
    return rows


def _pair(how: str, times: dict[str, list[float]], error: float) -> list[Row]:
    plain, ours = ({"forward": report.median_and_fifths(times[name])} for name in ("plain", "ours"))
    over = {"same engine": {"forward": ratio(times["ours"], times["plain"])}}
    name = f"decode, StableMask, {how}"
    return [
        {"variant": f"decode, plain, {how}", "ms": plain},
        {"variant": name, "gamma": "headwise", "engine": how, "ms": ours, "ratio": over, "check": error},
    ]


def _graph(call: Callable[[int], Any], calls: int = 16) -> torch.cuda.CUDAGraph:
    """Several calls in one graph, so that its own launch does not count."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(3):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return graph
