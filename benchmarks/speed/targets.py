"""What benchmarks.speed has to show, as data, and whether a record meets it, with the figure."""

from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
MET, MISSED, PARTLY, NOT = "met", "**missed**", "met where measured", "not measured"


class Target(NamedTuple):
    """limit holds for row[path[0]][path[1]]... of every row that where fits; each of its lengths is wanted."""

    device: str
    text: str
    where: dict[str, tuple[Any, ...]]
    path: tuple[str, ...]
    limit: float
    at_least: bool = False


class Verdict(NamedTuple):
    text: str
    limit: float
    verdict: str
    figure: str


def _ratio(against: str, mode: str) -> tuple[str, ...]:
    return ("ratio", against, mode, "median")


def _span(lengths: tuple[int, ...]) -> str:
    return ", ".join(str(n) if n < 1024 else f"{n // 1024}k" for n in lengths)


BOTH, SAME, FASTEST, FLEX = "forward+backward", "same engine", "fastest plain", "compiled flex"
OURS = {"group": ("attention",), "kind": ("causal",), "role": ("StableMask",)}
CHOSEN = OURS | {"role": ("StableMask, chosen",)}
LONG = (4096, 8192, 16384, 32768)
_HEADWISE, _ZERO = OURS | {"gamma": ("headwise",)}, OURS | {"gamma": ("zero",)}
_SAME_ENGINE = "StableMask / plain on the same engine, forward+backward, "

GPU = [
    Target("cuda", _SAME_ENGINE + "head-wise, S = 2k", _HEADWISE | {"length": (2048,)}, _ratio(SAME, BOTH), 1.03),
    Target("cuda", _SAME_ENGINE + "head-wise, S >= 4k", _HEADWISE | {"length": LONG}, _ratio(SAME, BOTH), 1.01),
    Target("cuda", _SAME_ENGINE + "gamma 0, S = 2k", _ZERO | {"length": (2048,)}, _ratio(SAME, BOTH), 1.06),
    Target("cuda", _SAME_ENGINE + "gamma 0, S = 4k", _ZERO | {"length": (4096,)}, _ratio(SAME, BOTH), 1.03),
    Target("cuda", _SAME_ENGINE + "gamma 0, S = 8k", _ZERO | {"length": (8192,)}, _ratio(SAME, BOTH), 1.015),
    Target("cuda", "chosen engine / fastest plain of all, S >= 4k", CHOSEN | {"length": LONG}, _ratio(FASTEST, BOTH), 1.03),
    Target(
        "cuda", "chosen engine / compiled flex causal, S >= 4k (1.25 times faster)", CHOSEN | {"length": LONG},
        _ratio(FLEX, BOTH), 0.8,
    ),
    Target(
        "cuda", "epilogue, gamma 0: of the measured copy bandwidth", {"group": ("epilogue",), "gamma": ("zero",)},
        ("values", "of copy bandwidth"), 0.85, at_least=True,
    ),
    Target(
        "cuda", "epilogue, head-wise at 4k: of gamma 0's time",
        {"group": ("epilogue",), "gamma": ("headwise",), "length": (4096,)}, ("values", "of gamma 0's time"), 0.25,
    ),
    Target("cuda", "peak memory / plain on the same engine", OURS, ("peak_ratio",), 1.01),
    *(
        Target(
            "cuda", f"decode step against 4k keys / plain, {how}", {"group": ("decode",), "engine": (how,)},
            _ratio(SAME, "forward"), 1.05,
        )
        for how in ("CUDA graph", "eager, wall clock")
    ),
]  # fmt: skip

_LONG = (1024, 2048, 4096, 8192)
# Forward alone over plain causal attention, at most, by S: bf16, fp32.
FORWARD = {(256,): (1.15, 1.10), (512,): (1.12, 1.07), (1024,): (1.08, 1.05), (2048,): (1.05, 1.05), (4096, 8192): (1.03, 1.03)}
_EAGER = _HEADWISE | {"engine": ("cpu",)}
_EITHER = _HEADWISE | {"engine": ("cpu", "cpu, no gradients")}
_STEP = {"group": ("decode",), "role": ("StableMask", "StableMask, a new position each step")}
_OVER_SDPA = "StableMask / SDPA causal, "
CPU = [
    *(
        Target(
            "cpu", f"{_OVER_SDPA}forward with and without gradients, {dtype}, one thread and all, S = {_span(lengths)}",
            _EITHER | {"dtype": (dtype,), "length": lengths}, _ratio(SAME, "forward"), limits[i],
        )
        for lengths, limits in FORWARD.items()
        for i, dtype in enumerate(("bf16", "fp32"))
    ),
    *(
        Target(
            "cpu", f"{_OVER_SDPA}forward, beyond its floor (the bare op and the epilogue's ops), {dtype}",
            _EITHER | {"dtype": (dtype,), "length": (256, 512, *_LONG)}, ("beyond floor", "median"), 0.02,
        )
        for dtype in ("bf16", "fp32")
    ),
    *(
        Target("cpu", f"{_OVER_SDPA}{mode}, one thread and all, S = {_span(lengths)}",
               _EAGER | {"length": lengths}, _ratio(SAME, mode), limit)
        for mode, limits in (("backward", (1.03, 1.03)), (BOTH, (1.03, 1.06)))
        for lengths, limit in zip((_LONG, (256, 512)), limits, strict=True)
    ),
    Target("cpu", "decode step: microseconds more than SDPA", _STEP, ("values", "us more than plain"), 50.0),
    Target("cpu", "decode step: microseconds more than its floor", _STEP, ("values", "us more than the floor"), 25.0),
    Target("cpu", "decode step / SDPA, where that takes 2.5 ms or more", _STEP, ("values", "of plain, which is long"), 1.10),
    Target("cpu", "decode step with a new position: median / p80 of a repeated one", _STEP, ("values", "of repeated's p80"), 1.0),
    Target("cpu", "first compiled call, plain causal, one head, seconds", {"group": ("first call",), "role": ("StableMask",)},
           ("values", "seconds"), 4.0),
    Target("cpu", "peak memory / SDPA, S = 32k, one head, forward+backward",
           {"group": ("memory",), "role": ("StableMask",), "length": (32768,)}, ("peak_ratio",), 1.2),
    *(
        Target("cpu", f"growth of the extra over causal, {mode}: S^2 term, in its own errors",
               {"group": ("growth",), "role": ("fit",), "mode": (mode,)}, ("values", "c in its errors"), 2.0)
        for mode in ("forward", BOTH)
    ),
]  # fmt: skip

# Of a peer that has no backward, forward alone is its only mode.
PEERS = [
    Target(device, f"peers / sm_flex of the same mass, {mode}, {text}",
           {"group": ("peers",), "role": ("peer",), "length": lengths}, _ratio("sm_flex", mode), limit, at_least=True)
    for device, lengths in (("cuda", (512, 1024, 2048, 4096, 8192, 16384)), ("cpu", (256, 512, 1024, 2048, 4096, 8192, 16384)))
    for mode in ("forward", BOTH)
    for text, limit, lengths in (("every S", 1.0, lengths), ("S >= 2k", 2.5, tuple(n for n in lengths if n >= 2048)))
    if (mode, limit) != ("forward", 2.5)
]  # fmt: skip
ALL = {"cuda": [*GPU, *(t for t in PEERS if t.device == "cuda")], "cpu": [*CPU, *(t for t in PEERS if t.device == "cpu")]}


def judge(rows: Sequence[Row], device: str) -> list[Verdict]:
    """Every target of the device, cuda or cpu, against the rows of a record."""
    return [_verdict(target, rows) for target in ALL[device]]


def _verdict(target: Target, rows: Sequence[Row]) -> Verdict:
    within = [row for row in rows if all(row.get(key) in allowed for key, allowed in target.where.items())]
    found = [(value, row) for row in within if (value := _at(row, target.path)) is not None]
    errors = sum("error" in row for row in within)
    unrun = sum("why" in row for row in within)
    failed = (f"; {errors} failed" if errors else "") + (f"; {unrun} not run" if unrun else "")
    if not found:
        return Verdict(target.text, target.limit, NOT, "none" + failed)
    good = [value >= target.limit if target.at_least else value <= target.limit for value, _ in found]
    worst, row = (min if target.at_least else max)(found, key=lambda pair: pair[0])
    missing = sorted(set(target.where.get("length", ())) - {row["length"] for _, row in found})
    absent = f"; not measured at S = {', '.join(map(str, missing))}" if missing else ""
    figure = f"worst {worst:.3f} ({row['variant']}: {row['case']}); {sum(good)} of {len(good)} within{absent}{failed}"
    verdict = MISSED if not all(good) else PARTLY if missing or errors or unrun else MET
    return Verdict(target.text, target.limit, verdict, figure)


def _at(row: Row, path: tuple[str, ...]) -> float | None:
    value: Any = row
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value
