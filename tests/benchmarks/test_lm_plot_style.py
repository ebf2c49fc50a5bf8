"""How variants look in the figures of benchmarks.lm: the same everywhere, and named where they end."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from benchmarks.lm import figures
from benchmarks.lm.plot_style import spread_labels
from tests.helpers.lines import line, ys
from tests.helpers.lm_record import VARIANTS, record


def test_a_variant_looks_the_same_everywhere_and_like_no_other():
    drawn = record()
    panels = [*figures.overview(drawn).axes, *figures.shares_by_layer(drawn).axes, *figures.scaling([drawn]).axes]
    looks = {}
    for name in VARIANTS:
        found = {(str(line(axes, name).get_color()), str(line(axes, name).get_marker())) for axes in panels}
        assert len(found) == 1, name
        (looks[name],) = found
    assert len({color for color, _ in looks.values()}) == len({marker for _, marker in looks.values()}) == len(VARIANTS)


def test_lines_that_end_as_one_have_a_legend_in_the_order_of_their_start():
    drawn = record()
    share = figures.overview(drawn).axes[2]
    (legend,) = [axes.get_legend() for axes in figures.shares_by_layer(drawn).axes if axes.get_legend() is not None]
    start = sorted(VARIANTS, key=lambda name: -ys(share, name)[0])
    for found in (share.get_legend(), legend):
        assert found is not None
        assert [text.get_text() for text in found.get_texts()] == [VARIANTS[name] for name in start]
        handles = [handle for handle in found.legend_handles if isinstance(handle, Line2D)]
        assert [handle.get_marker() for handle in handles] == [line(share, name).get_marker() for name in start]


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([0.2, 0.5], [0.2, 0.5]),
        ([0.45, 0.55], [0.4, 0.6]),
        ([0.5, 0.5, 0.5], [0.3, 0.5, 0.7]),
        ([0.3, 0.3, 0.45], [0.15, 0.35, 0.55]),
        ([0.0, 0.0], [0.0, 0.2]),
        ([0.95, 1.0], [0.8, 1.0]),
    ],
)
def test_names_move_apart_as_little_as_it_takes(heights: list[float], expected: list[float]):
    assert spread_labels(heights, 0.2) == pytest.approx(expected)


def overlap(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of names at line ends that stand on each other."""
    figure.draw_without_rendering()
    pairs = []
    for axes in figure.axes:
        boxes = [(text.get_text(), Text.get_window_extent(text)) for text in axes.texts]
        pairs += [(a, b) for i, (a, x) in enumerate(boxes) for b, y in boxes[:i] if min(x.y1, y.y1) - max(x.y0, y.y0) > 1]
    return pairs


def test_names_do_not_stand_on_each_other():
    drawn = record()
    for name, variant in drawn["variants"].items():  # all lines end at one point
        if name != "causal":
            variant["curve"] = drawn["variants"]["causal"]["curve"]
    for figure in (figures.overview(drawn), figures.scaling([drawn, record(parameters=7)])):
        assert overlap(figure) == []
        width, height = figure.get_size_inches() * figure.dpi
        for axes in figure.axes:
            for text in axes.texts:
                box = Text.get_window_extent(text)
                assert 0 <= box.x0 < box.x1 <= width, text.get_text()
                assert 0 <= box.y0 < box.y1 <= height, text.get_text()
    figure = Figure()
    axes = figure.subplots()
    for _ in range(2):
        axes.text(0.5, 0.5, "here")
    assert overlap(figure) == [("here", "here")]


def test_what_diverged_is_said():
    drawn = record(["causal", "stablemask", "pseudo-0"])
    drawn["variants"]["pseudo-0"]["perplexity"]["values"][1] = math.nan
    drawn["variants"]["pseudo-0"]["extrapolation"]["kept"]["0"]["perplexity"][2] = [40.0, math.inf, math.inf, math.inf]
    drawn["variants"]["stablemask"]["extrapolation"]["kept"]["0"]["perplexity"] = [[math.nan] * 4] * 3
    final, _, share, longer = figures.overview(drawn).axes
    assert final.get_yticklabels()[2].get_text() == "pseudo value 0 (diverged)"
    names = [text.get_text() for text in longer.texts]
    assert sorted(names) == ["StableMask, head-wise (diverged)", "causal", "causal + first 4", "pseudo value 0 (diverged)"]
    assert np.isfinite(ys(longer, "pseudo-0")).tolist() == [True, False, False, False]
    assert share.get_legend() is not None
