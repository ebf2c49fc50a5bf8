"""What the figures of every benchmark have in common; importing it sets matplotlib's defaults."""

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.rcParams.update({
    "axes.spines.right": False, "axes.spines.top": False, "axes.titlesize": 10, "figure.constrained_layout.use": True,
    "figure.titlesize": 10, "legend.fontsize": 8, "lines.markersize": 4, "savefig.dpi": 130,
})  # fmt: skip


def figure(width: float, height: float) -> Figure:
    """In inches."""
    return Figure(figsize=(width, height))


def log_axis(axes: Axes, values: Sequence[float], labels: Sequence[str] | None = None, base: float = 10) -> None:
    """A logarithmic x axis with a tick at each of values and nowhere else."""
    axes.set_xscale("log", base=base)
    axes.set_xticks(values, [str(value) for value in values] if labels is None else labels)
    axes.minorticks_off()
