"""The figures of benchmarks.cure, from the record that it writes.

    python -m benchmarks.cure.figures benchmarks/results/cure_cpu1_202611.json    # draws them again

Colour, dash, marker and name of a variant are the same in all of them.
"""

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks import plot, report
from benchmarks.lm.plot_style import SMALL, LineStyle, darkened, label_line_ends

UNTRAINED = "untrained"
STYLES = {
    UNTRAINED: LineStyle("#808080", (0, (2, 1)), "*"),
    "causal": LineStyle("#000000", "--", "o"),
    "headwise": LineStyle("#E69F00", "-.", "^"),
    "evicted": LineStyle("#D55E00", "-.", "v"),
    "evicted-headwise": LineStyle("#CC79A7", (0, (5, 1)), "X"),
    "mass": LineStyle("#56B4E9", "-", "D"),
    "evicted-mass": LineStyle("#0072B2", "-", "s"),
    "evicted-value": LineStyle("#009E73", (0, (5, 1)), "P"),
}
SHARE = (UNTRAINED, "headwise", "mass", "evicted-mass")
BARS = (UNTRAINED, "causal", "headwise", "evicted", "evicted-headwise", "mass", "evicted-mass", "evicted-value")
COLUMNS = (UNTRAINED, "evicted", "evicted-headwise", "evicted-mass")
STREAMED = {
    "untrained-causal": UNTRAINED, "untrained-causal+4": UNTRAINED, "untrained-mass-value": "evicted-value", "causal": "causal",
    "causal+4": "causal", "evicted": "evicted", "evicted-mass": "evicted-mass",
}  # fmt: skip
VIEWS = {"whole": "all keys", "window": "window", "window+4": "window + 4 first"}


def of_run(record: dict[str, Any]) -> dict[str, Figure]:
    """By the suffix of their files' names."""
    drawn = {
        "-bars": bars(record), "-columns": columns(record), "-share": share_by_layer(record), "-streaming": streaming(record),
    }  # fmt: skip
    return {suffix: figure for suffix, figure in drawn.items() if figure is not None}


def share_by_layer(record: dict[str, Any]) -> Figure | None:
    looks = _looks(record, SHARE, "whole")
    if not looks:
        return None
    figure, axes = _one(7.5, 3.6)
    lines = []
    for name, label, per_order in looks:
        shares = np.mean([x["share_by_layer"] for x in per_order], axis=0)
        lines.append(_line(axes, name, label, range(len(shares)), shares))
    axes.set(
        xlabel="layer", ylabel="attention to the first token", ylim=(0, None), title="The first token's share, all keys in view"
    )
    label_line_ends(figure, {axes: lines})
    return figure


def bars(record: dict[str, Any]) -> Figure | None:
    """Perplexity of the second half of the rows; the whiskers reach over the orders of training."""
    known = [(name, label, x) for name in BARS for label, x in [_losses(record, name)] if x is not None]
    if not known:
        return None
    figure, axes = _one(8, 3.8)
    width = 0.8 / len(known)
    for i, (name, label, x) in enumerate(known):
        color = STYLES[name].color
        for j, view in enumerate(VIEWS):
            each = [math.exp(statistics.fmean(rows)) for rows in x[view]["late"]]
            middle = math.exp(statistics.fmean(statistics.fmean(rows) for rows in x[view]["late"]))
            at = j + (i - (len(known) - 1) / 2) * width
            axes.bar(at, middle, width * 0.9, color=color, label=label if j == 0 else None)
            if len(each) > 1:
                axes.vlines(at, min(each), max(each), color="0.3", linewidth=1)
            axes.annotate(
                f"{middle:.0f}", (at, max([middle, *each])), (0, 2), textcoords="offset points", ha="center", fontsize=7
            )
    ticks = np.array([20, 30, 50, 100, 200])
    axes.set_yscale("log")
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(20, None)
    axes.set_xticks(
        range(len(VIEWS)), [f"{name} of {record['config']['window']}" if name == "window" else name for name in VIEWS.values()]
    )
    axes.set(ylabel="perplexity, tokens of the second half", title=f"After {record['config']['steps']} steps, and before any")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=SMALL)
    return figure


def columns(record: dict[str, Any]) -> Figure | None:
    """Where the sink went: mean attention of late rows to each of the first slots, order by order."""
    looks = _looks(record, COLUMNS, "own")
    if not looks:
        return None
    count = max(len(per_order) for _, _, per_order in looks)
    figure = plot.figure(8, 1.4 + 1.1 * len(looks))
    panels = figure.subplots(len(looks), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, label, per_order) in zip(panels, looks, strict=True):
        width = 0.8 / len(per_order)
        for i, look in enumerate(per_order):
            slots = np.arange(len(look["columns"]))
            shade = {"color": STYLES[name].color, "alpha": 1 - 0.3 * i}
            axes.bar(slots + (i - (len(per_order) - 1) / 2) * width, look["columns"], width, **shade)
        axes.text(
            0.99, 0.9, label, transform=axes.transAxes, ha="right", va="top", fontsize=SMALL, color=darkened(STYLES[name].color)
        )
    panels[-1].set_xlabel("slot of the key")
    several = f"; shades: {count} orders of training" if count > 1 else ""
    figure.supylabel("attention of the second half's rows", fontsize=SMALL)
    panels[0].set_title(f"Where the sink went, in the view of the training{several}")
    return figure


def streaming(record: dict[str, Any]) -> Figure | None:
    known = [(key, name, record["stream"][key]) for key, name in STREAMED.items() if key in record["stream"]]
    if not known:
        return None
    figure, axes = _one(8, 3.8)
    lines = []
    for key, name, x in known:
        smooth = np.mean(x["nats"], axis=0)
        smooth = smooth[: len(smooth) // 4 * 4].reshape(-1, 4).mean(1)  # 256 tokens a point
        at = (np.arange(len(smooth)) + 1) * 4 * x["block"]
        line = _line(axes, name, x["label"], at, np.exp(smooth))
        if key.endswith("+4") or key == "untrained-mass-value":
            line.set(linestyle=":", markerfacecolor="white")
        lines.append(line)
    axes.set_yscale("log")
    ticks = [15, 20, 30, 50, 100, 200]
    axes.set_yticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    window = record["config"]["window"]
    axes.set(xlabel="position", ylabel="perplexity", title=f"Streaming through a window of {window}")
    label_line_ends(figure, {axes: lines})
    return figure


def _one(width: float, height: float) -> tuple[Figure, Axes]:
    figure = plot.figure(width, height)
    return figure, figure.subplots()


def _line(axes: Axes, name: str, label: str, x: Any, y: Any) -> Line2D:
    style = STYLES[name]
    (line,) = axes.plot(list(x), y, color=style.color, linestyle=style.dash, marker=style.marker, label=name, gid=label)
    return line


def _looks(record: dict[str, Any], names: tuple[str, ...], view: str) -> list[tuple[str, str, list[dict[str, Any]]]]:
    return list(_each_look(record, names, view))


def _each_look(record: dict[str, Any], names: tuple[str, ...], view: str) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    for name in names:
        if name == UNTRAINED and "causal" in record["untrained"]:
            yield name, UNTRAINED, [record["untrained"]["causal"][view]]
        elif name in record["variants"]:
            yield name, record["variants"][name]["label"], record["variants"][name][view]


def _losses(record: dict[str, Any], name: str) -> tuple[str, dict[str, Any] | None]:
    if name == UNTRAINED:
        base = record["untrained"].get("causal")
        return name, base and {view: {part: [rows] for part, rows in x.items()} for view, x in base["losses"].items()}
    x = record["variants"].get(name)
    return ("", None) if x is None else (x["label"], x["losses"])


def main(argv: list[str] | None = None) -> None:
    parser = report.Parser("cure.figures", "Draw the figures of benchmarks.cure again.")
    parser.add_argument("record", type=Path, metavar="RECORD.json", help="what benchmarks.cure wrote")
    path = parser.parse_args(argv).record
    with parser.refusing(KeyError, TypeError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["benchmark"] != "cure":
            raise ValueError(f"{path} is no record of benchmarks.cure: give the .json that it wrote beside its .md")
        for suffix, figure in of_run(record).items():
            figure.savefig(path.with_name(f"{path.stem}{suffix}.png"))
            print(path.with_name(f"{path.stem}{suffix}.png"))


if __name__ == "__main__":
    main()
