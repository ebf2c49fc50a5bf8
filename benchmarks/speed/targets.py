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

_EAGER = _HEADWISE | {"engine": ("cpu",)}
CPU = [
    *(
        Target(
            "cpu", f"StableMask / SDPA causal, {mode}, {dtype}, {threads}, S = {span}",
            _EAGER | {"dtype": (dtype,), "all_threads": (every,), "length": lengths}, _ratio(SAME, mode), limit,
        )
        for lengths, span, limit in (((1024, 2048, 4096, 8192), "1k..8k", 1.03), ((256, 512), "256..512", 1.10))
        for dtype in ("bf16", "fp32")
        for every, threads in ((False, "one thread"), (True, "all threads"))
        for mode in ("forward", "backward")
    ),
    Target(
        "cpu", "dense formula / StableMask, forward+backward, S = 1k", {"engine": ("dense",), "length": (1024,)},
        _ratio("StableMask", BOTH), 4.0, at_least=True,
    ),
    Target("cpu", "first compiled call, plain causal, seconds", {"group": ("first call",), "role": ("StableMask",)},
           ("values", "seconds"), 10.0),
    Target("cpu", "peak memory / SDPA, S = 32k, one head, forward+backward",
           {"group": ("memory",), "role": ("StableMask",), "length": (32768,)}, ("peak_ratio",), 1.2),
]  # fmt: skip


def judge(rows: Sequence[Row], device: str) -> list[Verdict]:
    """Every target of the device, cuda or cpu, against the rows of a record."""
    return [_verdict(target, rows) for target in (GPU if device == "cuda" else CPU)]


def _verdict(target: Target, rows: Sequence[Row]) -> Verdict:
    within = [row for row in rows if all(row.get(key) in allowed for key, allowed in target.where.items())]
    found = [(value, row) for row in within if (value := _at(row, target.path)) is not None]
    errors = sum("error" in row for row in within)
    failed = f"; {errors} failed" if errors else ""
    if not found:
        return Verdict(target.text, target.limit, NOT, "none" + failed)
    good = [value >= target.limit if target.at_least else value <= target.limit for value, _ in found]
    worst, row = (min if target.at_least else max)(found, key=lambda pair: pair[0])
    missing = sorted(set(target.where.get("length", ())) - {row["length"] for _, row in found})
    absent = f"; not measured at S = {', '.join(map(str, missing))}" if missing else ""
    figure = f"worst {worst:.3f} ({row['variant']}: {row['case']}); {sum(good)} of {len(good)} within{absent}{failed}"
    verdict = MISSED if not all(good) else PARTLY if missing or errors else MET
    return Verdict(target.text, target.limit, verdict, figure)


def _at(row: Row, path: tuple[str, ...]) -> float | None:
    value: Any = row
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value
