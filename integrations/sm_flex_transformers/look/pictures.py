"""A report as PNGs: needs matplotlib."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sm_flex_transformers.look.run import ALL, KEPT, WINDOW

# Okabe and Ito's colours.
FIRST, PUNCTUATION, OTHER, GREY = "#0072B2", "#E69F00", "#999999", "#555555"


def draw(report: dict[str, Any], folder: Path) -> None:
    for name, figure in (
        ("first_token", first_token(report)), ("kinds", kinds(report)), ("norms", norms(report)), ("windows", windows(report)),
    ):  # fmt: skip
        figure.savefig(folder / f"{name}.png", dpi=130, facecolor="white", metadata={"Software": None})


def first_token(report: dict[str, Any]) -> Figure:
    """A map of layers by heads, and the share by position in thirds of the layers."""
    by_head = report["first"]["by_head"]
    grid = np.full((len(by_head), max(map(len, by_head))), np.nan)
    for i, heads in enumerate(by_head):
        grid[i, : len(heads)] = heads
    figure, (left, right) = _figure(9.5, 4.2, 2)
    image = left.imshow(grid, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=left, label="share of the first token")
    left.set(xlabel="head", ylabel="layer", title="attention to the first token")
    _whole_numbers(left)
    positions = report["positions"][1:]  # the first token sees itself alone
    curves = [np.mean(layer, 0)[1:] for layer in report["first"]["by_position"]]
    cut = np.array_split(np.arange(len(curves)), min(3, len(curves)))
    for layers, color in zip(cut, ("#9ecae1", "#4292c6", "#084594"), strict=False):
        names = report["layers"][layers[0]], report["layers"][layers[-1]]
        label = f"layers {names[0]} to {names[1]}" if len(layers) > 1 else f"layer {names[0]}"
        right.plot(positions, np.mean([curves[i] for i in layers], 0), color=color, lw=2, label=label)
    right.set(xscale="log", ylim=(0, 1.02), xlabel="position of the query", title="by position, mean of the heads")
    right.legend(frameon=False)
    return figure


def kinds(report: dict[str, Any]) -> Figure:
    """Figure 1b of the paper: who gets the attention, by kind of token and layer."""
    shares = np.array([np.mean(layer, 0) for layer in report["kinds"]["by_head"]])
    figure, (left, right) = _figure(9.5, 3.8, 2, ratios=(3, 1.2))
    x, below = np.arange(len(shares)), np.zeros(len(shares))
    names = ["first token", "punctuation", "other tokens"]
    for kind, color in enumerate((FIRST, PUNCTUATION, OTHER)):
        left.bar(x, shares[:, kind], bottom=below, color=color, width=0.85, label=names[kind])
        below += shares[:, kind]
    left.set_xticks(x, report["layers"], fontsize=8)
    if len(x) > 40:
        left.set_xticks(x[::8], report["layers"][::8])
    left.set(xlabel="layer", ylabel="share of the attention", title="attention by kind of token")
    left.set(xlim=(-0.7, len(x) - 0.3), ylim=(0, 1))
    for i, values in enumerate((report["kinds"]["mean"], report["kinds"]["of_tokens"])):
        bottom = 0.0
        for value, color in zip(values, (FIRST, PUNCTUATION, OTHER), strict=True):
            right.bar([i], [value], bottom=[bottom], color=color, width=0.7)
            if value > 0.04:
                right.text(i, bottom + value / 2, f"{100 * value:.0f} %", ha="center", va="center", color="white", weight="bold")
            bottom += value
    right.set(ylim=(0, 1), title="all layers", yticks=[])
    right.set_xticks([0, 1], ["of the\nattention", "of the\ntokens"])
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def norms(report: dict[str, Any]) -> Figure:
    figure, (axes,) = _figure(7, 3.8, 1)
    x = range(len(report["norms"]["first"]))
    for name, label, color in (
        ("first", "first token", FIRST), ("largest_other", "largest of any other", PUNCTUATION),
        ("median_other", "median of the others", OTHER),
    ):  # fmt: skip
        axes.plot(x, report["norms"][name], color=color, lw=2, marker="o", ms=3, label=label)
    axes.set(yscale="log", xlabel="layers passed", ylabel="norm of the hidden state", title="massive activations")
    axes.legend(frameon=False)
    _whole_numbers(axes, y=False)
    return figure


def windows(report: dict[str, Any]) -> Figure:
    tokens, found = report["tokens"], report["perplexity"]
    names = [
        "all keys",
        f"window of {tokens['window']}\nfirst token leaves",
        f"window of {tokens['window']}\nfirst {tokens['kept']} kept",
    ]
    values = [found[name]["late_perplexity"] or 0.0 for name in (ALL, WINDOW, KEPT)]
    figure, (axes,) = _figure(6, 3.6, 1)
    for i, (value, color) in enumerate(zip(values, (GREY, PUNCTUATION, FIRST), strict=True)):
        axes.bar([i], [value], color=color, width=0.6)
        axes.text(i, value, f"{value:,.1f}", ha="center", va="bottom")
    axes.set_xticks([0, 1, 2], names)
    axes.set(ylabel="perplexity", title=f"tokens from {found[ALL]['late_from']} on", ylim=(0, max(values) * 1.15 or 1))
    return figure


def _figure(width: float, height: float, panels: int, ratios: tuple[float, ...] | None = None) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, width_ratios=ratios)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _whole_numbers(axes: Axes, y: bool = True) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if y:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
