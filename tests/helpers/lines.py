"""A line of a figure and its numbers, for the tests of benchmarks.lm."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from benchmarks.lm.plot_style import points


def line(axes: Axes, name: str) -> Line2D:
    (found,) = [line for line in axes.lines if line.get_label() == name]
    return found


def xs(axes: Axes, name: str) -> np.ndarray:
    return points(line(axes, name))[:, 0]


def ys(axes: Axes, name: str) -> np.ndarray:
    return points(line(axes, name))[:, 1]
