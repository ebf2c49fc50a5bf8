"""The figures of benchmarks.lm, from the record that it writes.

    python -m benchmarks.lm.figures RECORD.json ...      # next to each record; of several, their scaling too

An overview for the README (what held and what did not), the first token's share by layer (Figure 1b of the
paper), attention maps (Appendix F), and perplexity against size (Figure 4a-c). plot_style.py says how a
variant looks in them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks import plot, report
from benchmarks.lm.plot_style import (
    DIVERGED,
    LEADING,
    SMALL,
    darkened,
    dodge,
    draw_line,
    draw_whiskers,
    finite,
    label_line_ends,
    legend_beside,
    points,
    style_of,
)

Variants = dict[str, dict[str, Any]]
ENCODINGS = {"rope": "RoPE", "alibi": "ALiBi"}
MOST_HEADS, HEADS_A_ROW = 8, 4
MOST_LAYERS = 4
SHADES = "Blues"


def of_run(record: dict[str, Any]) -> dict[str, Figure]:
    """By the suffix of the file's name: the overview and, where measured, shares by layer and maps."""
    figures = {"": overview(record)}
    for key, suffix, make in (("first_token_share", "-share", shares_by_layer), ("maps", "-maps", maps)):
        if _with(record["variants"], key):
            figures[suffix] = make(record)
    return figures


def overview(record: dict[str, Any]) -> Figure:
    """Perplexity, loss along the training and, where measured, first-token share and extrapolation."""
    variants, config = record["variants"], record["config"]
    watched, tried = _with(variants, "first_token_share"), _with(variants, "extrapolation")
    rows = 2 if watched or tried else 1
    figure = plot.figure(10, 3.7 * rows)
    panels = iter(figure.subplots(rows, 2, squeeze=False).flat)
    _final(next(panels), variants)
    training = next(panels)
    lines = {training: _training(training, variants)}
    if watched:
        means = {name: np.mean(variant["first_token_share"]["by_layer"], axis=0) for name, variant in watched.items()}
        share = next(panels)
        legend_beside(share, _share(share, watched, "first_token_share", means))
        title = "attention to the first token (mean over layers)"
        share.set(xlabel="position of the query", ylabel="share of its attention", ylim=(0, None), title=title)
    if tried:
        longer = next(panels)
        lines[longer] = _extrapolation(longer, tried)
        longer.set_title(f"longer texts, attention to the last {config['window']} tokens")
    for axes in panels:
        axes.remove()
    seeds = max(len(variant["seeds"]) for variant in variants.values())
    spread = "one seed" if seeds == 1 else f"{seeds} seeds (bars and bands from the lowest to the highest)"
    size = f"{config['parameters'] / 1e6:.3g} M parameters, {ENCODINGS.get(config['position'], config['position'])}"
    title = f"{config['text']}: {size}, {config['steps']} steps at length {config['length']}; {spread}"
    figure.suptitle(title)
    label_line_ends(figure, lines)
    return figure


def shares_by_layer(record: dict[str, Any]) -> Figure:
    """A column per layer (of many, a few): what the first token gets, and what no token gets."""
    variants, layers = _with(record["variants"], "first_token_share"), record["config"]["layers"]
    chosen = np.unique(np.linspace(0, layers - 1, min(layers, MOST_LAYERS)).round().astype(int))
    figure = plot.figure(2.1 * len(chosen) + 1.9, 5.4)
    grid = figure.subplots(2, len(chosen), sharex=True, sharey="row", squeeze=False)
    lines = []
    for row, (key, title) in enumerate((("first_token_share", "first token"), ("pseudo_share", "no token"))):
        for axes, layer in zip(grid[row], chosen, strict=True):
            shares = {name: variant[key]["by_layer"][layer] for name, variant in variants.items()}
            lines.append(_share(axes, variants, key, shares))
            axes.set_title(f"layer {layer + 1}: {title}")
            axes.label_outer()
        # Shared by the row, and so set when all of it is drawn: earlier, it would cut off what is higher in a later layer.
        grid[row, 0].set(ylabel="share of the attention", ylim=(0, None))
    for axes in grid[-1]:
        axes.set_xlabel("position of the query")
    legend_beside(grid[0, -1], lines[len(chosen) - 1])
    return figure


def maps(record: dict[str, Any]) -> Figure:
    """Chosen heads with and without StableMask; the strip at the right of a map is 1 - its rows' sums."""
    variants = list(_with(record["variants"], "maps").values())
    count = min(MOST_HEADS, *(len(variant["maps"]) for variant in variants))
    columns = min(HEADS_A_ROW, count)
    rows = -(-count // columns) * len(variants)
    figure = plot.figure(2.35 * columns + 0.9, 2.35 * rows + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    norm = PowerNorm(0.5, 0, 1)
    for row, variant in enumerate(variants):
        for i, head in enumerate(variant["maps"][:count]):
            axes = grid[i // columns * len(variants) + row, i % columns]
            _map(axes, head, norm)
            axes.set_title(f"{variant['label']}\nlayer {head['layer'] + 1}, head {head['head'] + 1}", fontsize=SMALL)
    ticks = [0, 0.05, 0.2, 0.5, 1]
    bar = figure.colorbar(ScalarMappable(norm, SHADES), ax=grid, shrink=0.5, aspect=30, pad=0.01, ticks=ticks, format="{x:g}")
    bar.set_label("attention probability", fontsize=SMALL)
    figure.suptitle("row: query, column: key; right strip: what the row gives to no token")
    return figure


def scaling(records: Sequence[dict[str, Any]]) -> Figure:
    """Perplexity against the number of parameters, and how much more than causal's it is."""
    for key in ("text", "length", "position"):
        values = {str(record["config"][key]) for record in records}
        if len(values) > 1:
            raise ValueError(f"records must be of one {key} to be compared, got {', '.join(sorted(values))}: draw them apart")
    ordered = sorted(records, key=lambda record: record["config"]["parameters"])
    labels = {name: variant["label"] for record in ordered for name, variant in record["variants"].items()}
    figure = plot.figure(10, 4)
    left, right = figure.subplots(1, 2)
    lines = []
    for i, (name, label) in enumerate(labels.items()):
        having = [record for record in ordered if name in record["variants"]]
        sizes = dodge([record["config"]["parameters"] / 1e6 for record in having], i, len(labels))
        values = [finite(record["variants"][name]["perplexity"]["values"]) for record in having]
        draw_whiskers(left, draw_line(left, name, label, sizes, [v.mean() for v in values]), values)
        more = [(size, _more_than_causal(r["variants"], name)) for size, r in zip(sizes, having, strict=True)]
        more = {size: percent for size, percent in more if percent.size}
        if more:
            lines.append(draw_line(right, name, label, list(more), [percent.mean() for percent in more.values()]))
            draw_whiskers(right, lines[-1], list(more.values()))
    for axes, title, unit in (
        (left, "validation perplexity", "perplexity (per token)"),
        (right, "more than causal's of the same seed", "%"),
    ):
        sizes = [record["config"]["parameters"] / 1e6 for record in ordered]
        plot.log_axis(axes, sizes, [f"{size:.3g} M" for size in sizes])
        axes.set(xlabel="parameters", ylabel=unit, title=title)
    config = records[0]["config"]
    encoding = ENCODINGS.get(config["position"], config["position"])
    title = f"{config['text']}, {encoding}, length {config['length']}; bars from the lowest seed to the highest"
    figure.suptitle(title)
    label_line_ends(figure, {right: lines} if lines else {})
    return figure


def _with(variants: Variants, key: str) -> Variants:
    """The variants that have a measurement: texts may be too short for some."""
    return {name: variant for name, variant in variants.items() if variant.get(key)}


def _more_than_causal(variants: Variants, name: str) -> np.ndarray:
    """Perplexity over causal's of the same seed, less 1, in percent; for the seeds that both have."""
    mine, base = (
        dict(zip(v["seeds"], v["perplexity"]["values"], strict=True)) for v in (variants[name], variants.get("causal", NONE))
    )
    return np.array([100 * (mine[seed] / base[seed] - 1) for seed in mine if seed in base])


NONE: dict[str, Any] = {"seeds": [], "perplexity": {"values": []}}


def _final(axes: Axes, variants: Variants) -> None:
    """A row per variant: a hollow mark per seed, a line for their range, a filled mark for their mean."""
    axes.yaxis.tick_right()
    labels = []
    for row, (name, variant) in enumerate(variants.items()):
        values, style = finite(variant["perplexity"]["values"]), style_of(name)
        axes.plot([values.min(), values.max()], [row, row], color=style.color, linewidth=1.5)
        axes.plot(values, [row] * len(values), style.marker, color=style.color, fillstyle="none", markersize=6)
        axes.plot([values.mean()], [row], style.marker, color=style.color, markersize=8, label=name)
        if name == "causal":
            axes.axvspan(values.min(), values.max(), color="0.9", zorder=0)
        labels.append(variant["label"] + ("" if np.isfinite(values).all() else DIVERGED))
    axes.set_yticks(range(len(variants)), labels)
    for text, name in zip(axes.get_yticklabels(), variants, strict=True):
        text.set(fontsize=SMALL, color=darkened(style_of(name).color))
    axes.tick_params("y", length=0)
    several = any(len(variant["seeds"]) > 1 for variant in variants.values())
    title = "validation" + (": each seed hollow, their mean filled" if several else "")
    axes.set(xlabel="perplexity (per token)", ylim=(len(variants) - 0.4, -0.6), title=title)
    axes.spines["left"].set_visible(False)


def _training(axes: Axes, variants: Variants) -> list[Line2D]:
    """The loss along the training, less causal's of the same seed where there is a causal."""
    causal = variants.get("causal")
    lines = []
    for name, variant in variants.items():
        steps, losses = variant["curve"]["steps"], dict(zip(variant["seeds"], variant["curve"]["loss"], strict=True))
        if causal is not None:
            base = dict(zip(causal["seeds"], causal["curve"]["loss"], strict=True))
            losses = {seed: np.subtract(loss, base[seed]) for seed, loss in losses.items() if seed in base}
        if losses:
            by_seed = finite(list(losses.values()))
            lines.append(draw_line(axes, name, variant["label"], steps, by_seed.mean(axis=0)))
            if name in LEADING:
                color = lines[-1].get_color()
                axes.fill_between(steps, by_seed.min(axis=0), by_seed.max(axis=0), color=color, alpha=0.15, linewidth=0)
    title = "validation loss" + (" minus causal's of the same seed" if causal else "")
    axes.set(xlabel="training steps", ylabel="nats per byte", title=title)
    return lines


def _share(axes: Axes, variants: Variants, key: str, shares: dict[str, Any]) -> list[Line2D]:
    """shares over positions, which are on a logarithmic axis, every other one named."""
    lines = [
        draw_line(axes, name, variant["label"], variant[key]["positions"], shares[name]) for name, variant in variants.items()
    ]
    positions = next(iter(variants.values()))[key]["positions"]
    plot.log_axis(axes, positions[::2], base=2)
    return lines


def _extrapolation(axes: Axes, variants: Variants) -> list[Line2D]:
    lines = []
    times = next(iter(variants.values()))["extrapolation"]["times"]
    for name, variant in variants.items():
        for kept, measured in variant["extrapolation"]["kept"].items():
            by_seed = finite(measured["perplexity"])
            aside = dodge(times, len(lines), len(variants))
            lines.append(draw_line(axes, name, variant["label"], aside, by_seed.mean(axis=0)))
            if kept != "0" and name != "token-learned":  # whose artificial token is always kept
                lines[-1].set(linestyle=":", label=f"{name}+{kept}", gid=f"{variant['label']} + first {kept}")
            draw_whiskers(axes, lines[-1], by_seed.T)
    everything = np.concatenate([points(line)[:, 1] for line in lines])
    if np.nanmax(everything) > 2 * np.nanmin(everything):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    plot.log_axis(axes, times, [f"{time}x" for time in times], base=2)
    axes.set(xlabel="length, in training lengths", ylabel="perplexity (per token)")
    return lines


def _map(axes: Axes, head: dict[str, Any], norm: PowerNorm) -> None:
    """The lower triangle, grey where the future is, and a strip with what each row gives to no token."""
    n = head["tokens"]
    matrix = np.full((n, n), np.nan)
    for i, row in enumerate(head["rows"]):
        matrix[i, : i + 1] = row
    nothing = 1 - np.nansum(matrix, axis=1, keepdims=True)
    left, width = 1.02 * n, 0.08 * n
    axes.add_patch(Rectangle((-0.5, -0.5), n, n, color="0.9", linewidth=0, zorder=-1))
    for shares, (start, end) in ((matrix, (-0.5, n - 0.5)), (nothing, (left, left + width))):
        axes.imshow(shares, SHADES, norm, interpolation="nearest", extent=(start, end, n - 0.5, -0.5))
    axes.add_patch(Rectangle((left, -0.5), width, n, fill=False, color="0.6", linewidth=0.5))
    axes.set(xlim=(-0.6, left + width + 0.5), ylim=(n - 0.4, -0.6))


def main(argv: list[str] | None = None) -> None:
    parser = report.Parser("lm.figures", "Draw the figures of benchmarks.lm again.")
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORD.json", help="what benchmarks.lm wrote")
    paths = parser.parse_args(argv).records
    figures: dict[Path, Figure] = {}
    with parser.refusing():
        records = [_load(path) for path in paths]
        if len(records) > 1:
            figures[paths[0].with_name(f"{paths[0].stem}-scaling.png")] = scaling(records)
        for record, path in zip(records, paths, strict=True):
            figures |= {path.with_name(f"{path.stem}{suffix}.png"): figure for suffix, figure in of_run(record).items()}
        for path, figure in figures.items():
            figure.savefig(path)
            print(path)


def _load(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    known = isinstance(record, dict) and record.get("benchmark") == "lm" and record.get("variants")
    if not known or not all("extrapolation" in variant for variant in record["variants"].values()):
        raise ValueError(f"{path} is no record of benchmarks.lm: give the .json that it wrote beside its .md")
    return record


if __name__ == "__main__":
    main()
