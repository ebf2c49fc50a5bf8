"""The figures of benchmarks.speed: what StableMask costs over causal attention, what peers cost over it, and how it grows."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks import plot
from benchmarks.lm.plot_style import SMALL, label_line_ends
from benchmarks.speed.timing import MODES

Row = dict[str, Any]
Line = tuple[str, list[tuple[float, float]]]
FORWARD, _, BOTH = MODES
# Okabe and Ito's colours, and a marker each: no two lines of a panel share either.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#808080", "#7A4B9A", "#8B5A2B")
MARKERS = "osD^vPX*p<"


def draw(rows: Sequence[Row], device: str) -> dict[str, Figure]:
    """By the suffix of the file's name."""
    figures = {"": overview(rows, device)}
    if any(row["group"] == "growth" and "extra ms" in row for row in rows):
        figures["-growth"] = growth(rows)
    return figures


def overview(rows: Sequence[Row], device: str) -> Figure:
    """One panel a question, each a ratio against S."""
    figure = plot.figure(15, 8.5)
    (forward, both), (times, memory) = figure.subplots(2, 2)
    shown = "fp32" if device == "cpu" else "bf16"
    peers = [
        row for row in rows if row["group"] == "peers" and row["role"] == "peer" and row["dtype"] == shown and "ratio" in row
    ]
    panels = {
        forward: _draw(forward, _over_causal(rows, FORWARD, device)),
        both: _draw(both, _over_causal(rows, BOTH, device)),
        times: _draw(times, _lines(peers, _peer_name, _peer_time)),
        memory: _draw(memory, _lines(peers, _peer_name, lambda row: row.get("peak_ratio"))),
    }
    forward.set_title("StableMask / plain causal, forward")
    both.set_title("StableMask / plain causal, forward and backward")
    times.set_title(f"Peers' time / sm_flex, forward and backward, {shown}")
    memory.set_title(f"Peers' memory / sm_flex, {shown}")
    for axes in (times, memory):
        _log_y(axes)
    label_line_ends(figure, {axes: lines for axes, lines in panels.items() if lines})
    return figure


def _over_causal(rows: Sequence[Row], mode: str, device: str) -> list[Line]:
    """On a CPU all threads with and without gradients, or all and one; on a GPU each engine."""
    found = [
        row for row in rows
        if row["group"] == "attention" and row["kind"] == "causal" and row["role"] == "StableMask" and not row["impl"]
        and row["gamma"] == "headwise" and mode in row.get("ratio", {}).get("same engine", {})
    ]  # fmt: skip
    layouts = [(row["heads"], row["kv_heads"], row["head_dim"]) for row in found]
    usual = max(layouts, key=layouts.count) if layouts else None
    found = [row for row, layout in zip(found, layouts, strict=True) if layout == usual]
    if device == "cpu":
        found = [row for row in found if row["engine"].startswith("cpu") and "compiled" not in row["engine"]]
        if mode == FORWARD:
            found = [row for row in found if row["all_threads"]]

    def name(row: Row) -> str:
        if device != "cpu":
            return row["engine"]
        if mode == FORWARD:
            return f"{row['dtype']}, {'with' if row.get('backward', True) else 'without'} gradients"
        return f"{row['dtype']}, {'all threads' if row['all_threads'] else 'one thread'}"

    return _lines(found, name, lambda row: row["ratio"]["same engine"][mode]["median"])


def _peer_name(row: Row) -> str:
    return row["variant"] + ("" if row.get("backward", True) else " (forward alone)")


def _peer_time(row: Row) -> float:
    by_mode = row["ratio"]["sm_flex"]
    return by_mode[BOTH if BOTH in by_mode else FORWARD]["median"]


def _lines(rows: Iterable[Row], name: Callable[[Row], str], value: Callable[[Row], float | None]) -> list[Line]:
    found: dict[str, dict[float, float]] = {}
    for row in sorted(rows, key=lambda row: row["length"]):
        y = value(row)
        if y is not None:
            found.setdefault(name(row), {}).setdefault(row["length"], y)
    return [(label, list(points.items())) for label, points in sorted(found.items())]


def _draw(axes: Axes, lines: Sequence[Line]) -> list[Line2D]:
    axes.axhline(1, color="gray", linewidth=0.8)
    drawn = []
    for i, (name, points) in enumerate(lines):
        drawn += axes.plot(*zip(*points, strict=True), color=COLORS[i % 10], marker=MARKERS[i % 10], gid=name, linewidth=1.4)
    _lengths(axes, sorted({x for _, points in lines for x, _ in points}))
    return drawn


def _lengths(axes: Axes, lengths: Sequence[float]) -> None:
    lengths = lengths or [1]
    plot.log_axis(axes, lengths, [f"{n / 1024:.3g}k" if n >= 1024 else f"{n:g}" for n in lengths], base=2)
    axes.set_xlabel("S")


def _log_y(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if all(len(np.unique(np.asarray(line.get_ydata()))) == 1 for line in axes.lines):
        axes.set_ylim(0.5, 2)


def growth(rows: Sequence[Row]) -> Figure:
    """Extra milliseconds against S, with p20 to p80 and the fit a + b S + c S^2; what is not above 0 lies on the edge."""
    figure = plot.figure(13, 4.6)
    panels: dict[Axes, list[Line2D]] = {}
    for axes, mode in zip(figure.subplots(1, 2), (FORWARD, BOTH), strict=True):
        found = [row for row in rows if row["group"] == "growth" and mode in row.get("extra ms", {})]
        fits = {_series(row): row["values"] for row in rows if row["group"] == "growth" and row.get("mode") == mode}
        panels[axes] = []
        above = [row["extra ms"][mode]["median"] for row in found if row["extra ms"][mode]["median"] > 0]
        edge = 0.5 * min(above, default=1.0)
        for i, series in enumerate(dict.fromkeys(map(_series, found))):
            own = [row for row in found if _series(row) == series]
            s, ms = np.array([row["length"] for row in own]), [row["extra ms"][mode] for row in own]
            y = np.array([max(edge, x["median"]) for x in ms])
            low, high = (np.array([max(edge, x[key]) for x in ms]) for key in ("p20", "p80"))
            axes.vlines(s * 1.03 ** (i - 1.5), low, high, color=COLORS[i], linewidth=1)
            points = axes.plot(s * 1.03 ** (i - 1.5), y, color=COLORS[i], marker=MARKERS[i], linestyle="", gid=series)
            panels[axes] += points
            if series in fits:
                grid = np.geomspace(s.min(), s.max(), 60)
                values = fits[series]
                line = values["a ms"] + values["b ms"] * grid + values["c ms"] * grid**2
                axes.plot(grid, np.where(line > edge, line, np.nan), color=COLORS[i], linewidth=1)
        _lengths(axes, sorted({row["length"] for row in found}))
        _log_y(axes)
        axes.set(title=f"StableMask less plain causal, {mode}", ylabel="ms")
        axes.text(0.01, 0.98, "lines: a + b S + c S²", transform=axes.transAxes, va="top", fontsize=SMALL, color="gray")
    label_line_ends(figure, {axes: lines for axes, lines in panels.items() if lines})
    return figure


def _series(row: Row) -> str:
    return f"{row['dtype']}, {row['heads']} head{'s' * (row['heads'] > 1)}"
