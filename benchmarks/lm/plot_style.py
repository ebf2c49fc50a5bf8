"""How a variant looks in every figure of benchmarks.lm: colour, dash, marker, and a name beside its line.

Okabe and Ito's colours, which colour-blind readers tell apart; dash, marker and name say the same in grey
print. Whiskers reach from the lowest seed to the highest. A line's label is the variant's key, its gid the
name that readers see.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D


class LineStyle(NamedTuple):
    color: str
    dash: Any
    marker: str


LINE_STYLES = {
    "causal": LineStyle("#000000", "--", "o"),
    "stablemask": LineStyle("#0072B2", "-", "s"),
    "stablemask-0.5": LineStyle("#56B4E9", "-", "D"),
    "pseudo-0": LineStyle("#E69F00", "-.", "^"),
    "pseudo-0.01": LineStyle("#D55E00", "-.", "v"),
    "token-fixed": LineStyle("#009E73", (0, (5, 1)), "P"),
    "token-learned": LineStyle("#CC79A7", (0, (5, 1)), "X"),
    "sink-learned": LineStyle("#808080", (0, (2, 1)), "*"),
    "sink-value": LineStyle("#808080", "-", "p"),
}
LEADING = ("causal", "stablemask")  # the two that are compared; the other lines are thinner
SMALL = 9  # points; a README shows 10 inches as some 850 pixels
DIVERGED = " (diverged)"


def style_of(name: str) -> LineStyle:
    return LINE_STYLES.get(name, LineStyle("#555555", ":", "d"))


def finite(values: Any) -> np.ndarray:
    """Numbers as an array; what diverged, an infinity or no number, is NaN, which is not drawn."""
    array = np.array(values, dtype=float)
    return np.where(np.isfinite(array), array, np.nan)


def draw_line(axes: Axes, name: str, shown: str, x: Sequence[float], y: Any) -> Line2D:
    style, leads = style_of(name), name in LEADING
    (line,) = axes.plot(
        x, finite(y), color=style.color, linestyle=style.dash, marker=style.marker, label=name, gid=shown,
        linewidth=2 if leads else 1.2, markersize=5 if leads else 4, zorder=3 if leads else 2,
    )  # fmt: skip
    return line


def draw_whiskers(axes: Axes, line: Line2D, values: Iterable[Any]) -> None:
    """From the lowest to the highest of the seeds of each point of a line."""
    low, high = ([extreme(finite(v)) for v in values] for extreme in (np.min, np.max))
    axes.vlines(points(line)[:, 0], low, high, color=line.get_color(), linewidth=1, label=str(line.get_label()))


def points(line: Line2D) -> np.ndarray:
    """(points, 2): x and y of a line."""
    return np.asarray(line.get_xydata(), dtype=float)


def dodge(x: Sequence[float], i: int, count: int) -> list[float]:
    """x of the i-th of count lines, shifted a little on a logarithmic axis: no whiskers hide others."""
    return [value * 1.02 ** (i - (count - 1) / 2) for value in x]


def label_line_ends(figure: Figure, panels: dict[Axes, list[Line2D]]) -> None:
    """Each line's name to the right of its end, apart from other names, and joined to the end by a leader.

    To be called when all else is drawn.
    """
    figure.draw_without_rendering()  # settles the limits and sizes of the axes
    for axes, lines in panels.items():
        ends = [_end(axes, line) for line in lines]
        heights = (axes.transData + axes.transAxes.inverted()).transform(ends)[:, 1]
        gap = 1.3 * SMALL / 72 * figure.dpi / axes.get_window_extent().height
        for i, height in zip(np.argsort(heights), spread_labels(sorted(heights), gap), strict=True):
            color = lines[i].get_color()
            shown = f"{lines[i].get_gid()}{'' if np.isfinite(points(lines[i])).all() else DIVERGED}"
            leader = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3}
            axes.annotate(
                shown, ends[i], (1.06, height), "data", "axes fraction", va="center", fontsize=SMALL, color=darkened(color),
                annotation_clip=False, arrowprops=leader,
            )  # fmt: skip


def legend_beside(axes: Axes, lines: list[Line2D]) -> None:
    """A legend to the right, in the order of the lines' first points: for lines that end as one."""
    ordered = sorted(lines, key=lambda line: -np.nan_to_num(points(line)[0, 1]))
    axes.legend(
        ordered, [str(line.get_gid()) for line in ordered], loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False,
        fontsize=SMALL, labelcolor=[darkened(line.get_color()) for line in ordered], handlelength=3,
    )  # fmt: skip


def _end(axes: Axes, line: Line2D) -> np.ndarray:
    """The last point that is drawn; the upper right corner for a line that has none."""
    drawn = points(line)[np.isfinite(points(line)).all(axis=1)]
    return drawn[-1] if len(drawn) else (axes.transAxes - axes.transData).transform((1, 1))


def spread_labels(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights in [0, 1], moved as little as it takes to be gap apart.

    Those that would meet form a block around their mean.
    """
    blocks: list[tuple[float, int]] = []  # the mean of the heights, how many
    for height in heights:
        mean, count = height, 1
        while blocks and mean - blocks[-1][0] < gap * (count + blocks[-1][1]) / 2:
            before, more = blocks.pop()
            mean, count = (mean * count + before * more) / (count + more), count + more
        blocks.append((mean, count))
    moved = [mean + gap * (i - (count - 1) / 2) for mean, count in blocks for i in range(count)]
    moved = [max(y, gap * i) for i, y in enumerate(moved)]  # within [0, 1] if there is room
    return [min(y, 1 - gap * (len(moved) - 1 - i)) for i, y in enumerate(moved)]


def darkened(color: Any) -> tuple[float, ...]:
    """A colour for small letters: a light one is darkened until it stands out from white."""
    rgb = np.array(to_rgb(color))
    luma = float(rgb @ (0.299, 0.587, 0.114))
    return tuple(rgb * min(1.0, 0.45 / max(luma, 1e-9)))
