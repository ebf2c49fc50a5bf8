"""The figures of benchmarks.lm hold the record: every line, dot, bar and pixel is a number of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from benchmarks.lm import figures
from benchmarks.lm.plot_style import points
from tests.helpers.lines import xs, ys
from tests.helpers.lm_record import POSITIONS, TIMES, VARIANTS, record


def written(figure: Figure) -> list[str]:
    """Every text that a figure shows, axis by axis."""
    axes = figure.axes
    titles = [a.get_title() for a in axes] + [a.get_xlabel() for a in axes] + [a.get_ylabel() for a in axes]
    ticks = [text.get_text() for a in axes for text in (*a.get_xticklabels(), *a.get_yticklabels())]
    return titles + ticks + [text.get_text() for a in axes for text in a.texts] + [figure.get_suptitle()]


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(np.asarray(a, dtype=float), b, rtol=1e-12)


def test_final_perplexity_of_every_seed():
    drawn = record()
    final = figures.overview(drawn).axes[0]
    for row, (name, variant) in enumerate(drawn["variants"].items()):
        values = variant["perplexity"]["values"]
        span, seeds, mean = (line for line in final.lines if set(points(line)[:, 1]) == {row})
        close(span.get_xdata(), [min(values), max(values)])
        close(seeds.get_xdata(), values)
        close(mean.get_xdata(), [sum(values) / 3])
        assert mean.get_label() == name
        assert final.get_yticklabels()[row].get_text() == variant["label"]


def test_training_is_less_causal_of_the_same_seed():
    """A variant that began later shares two of causal's three seeds: only those are compared."""
    drawn = record(["causal", "stablemask", "pseudo-0"])
    late = drawn["variants"]["stablemask"]
    late["seeds"] = [1, 2, 3]
    training = figures.overview(drawn).axes[1]
    causal = np.array(drawn["variants"]["causal"]["curve"]["loss"])
    expected = np.array(late["curve"]["loss"])[:2] - causal[1:]
    close(ys(training, "stablemask"), expected.mean(0))
    close(xs(training, "stablemask"), late["curve"]["steps"])
    close(ys(training, "pseudo-0"), (np.array(drawn["variants"]["pseudo-0"]["curve"]["loss"]) - causal).mean(0))
    assert abs(ys(training, "causal")).max() == 0
    band = np.asarray(training.collections[1].get_paths()[0].vertices)[:, 1]
    close([band.min(), band.max()], [expected.min(), expected.max()])
    assert "causal" in training.get_title()


def test_training_without_causal_is_the_loss():
    drawn = record(["stablemask", "pseudo-0"])
    training = figures.overview(drawn).axes[1]
    close(ys(training, "pseudo-0"), np.mean(drawn["variants"]["pseudo-0"]["curve"]["loss"], axis=0))
    assert training.get_title() == "validation loss"


def test_shares_by_position_and_layer():
    drawn = record(layers=3)
    share = figures.overview(drawn).axes[2]
    by_layer = figures.shares_by_layer(drawn).axes
    assert len(by_layer) == 2 * 3
    for name, variant in drawn["variants"].items():
        close(xs(share, name), POSITIONS)
        close(ys(share, name), np.mean(variant["first_token_share"]["by_layer"], axis=0))
        for row, key in enumerate(("first_token_share", "pseudo_share")):
            for layer in range(3):
                axes = by_layer[3 * row + layer]
                close(ys(axes, name), variant[key]["by_layer"][layer])
                low, high = axes.get_ylim()
                assert low <= min(ys(axes, name)) <= max(ys(axes, name)) <= high, "a line is cut off"
                assert axes.get_title().startswith(f"layer {layer + 1}:")


def test_of_many_layers_a_few_are_drawn_first_and_last_among_them():
    drawn = record(["causal"], layers=12)
    axes = figures.shares_by_layer(drawn).axes
    assert [a.get_title().split(":")[0] for a in axes[:4]] == ["layer 1", "layer 5", "layer 8", "layer 12"]
    close(ys(axes[1], "causal"), drawn["variants"]["causal"]["first_token_share"]["by_layer"][4])


def test_extrapolation_with_and_without_kept_tokens():
    drawn = record()
    longer = figures.overview(drawn).axes[3]
    bars = {c.get_label(): c for c in longer.collections if isinstance(c, LineCollection)}
    for name, variant in drawn["variants"].items():
        for kept, measured in variant["extrapolation"]["kept"].items():
            label = f"{name}+4" if kept == "4" else name
            by_seed = np.array(measured["perplexity"])
            close(ys(longer, label), by_seed.mean(0))
            np.testing.assert_allclose(xs(longer, label), TIMES, rtol=0.1)
            spans = [segment[:, 1] for segment in bars[label].get_segments()]
            close(spans, np.stack([by_seed.min(0), by_seed.max(0)], axis=1))
    shown = [text.get_text() for text in longer.texts]
    assert len(shown) == len(VARIANTS) + 1
    assert {"causal", "causal + first 4", "learned artificial token"} < set(shown)
    assert longer.get_yscale() == "log"
    assert [text.get_text() for text in longer.get_xticklabels()] == ["1x", "2x", "4x", "8x"]
    flat = figures.overview(record(["stablemask", "pseudo-0"])).axes[3]
    assert flat.get_yscale() == "linear"


def test_maps_are_the_heads_and_what_they_give_to_no_token():
    drawn = record()
    figure = figures.maps(drawn)
    panels = figure.axes[:-1]  # the last is the colour bar
    assert len(panels) == 16
    for row, name in enumerate(("causal", "stablemask")):
        for i, head in enumerate(drawn["variants"][name]["maps"]):
            axes = panels[(i // 4 * 2 + row) * 4 + i % 4]
            matrix, nothing = (np.asarray(image.get_array(), dtype=float) for image in axes.images)
            for r, values in enumerate(head["rows"]):
                close(matrix[r, : r + 1], values)
                assert np.isnan(matrix[r, r + 1 :]).all()
                assert abs(nothing[r, 0] - (1 - sum(values))) < 1e-12
            assert axes.get_title() == f"{VARIANTS[name]}\nlayer {head['layer'] + 1}, head {head['head'] + 1}"
            assert {(image.norm.vmin, image.norm.vmax) for image in axes.images} == {(0, 1)}
    causal, ours = (np.asarray(panels[i].images[1].get_array(), dtype=float) for i in (0, 4))
    assert abs(causal).max() < 1e-12
    assert ours.min() > 0.1


def test_scaling_of_several_sizes():
    sizes = [8_400_000, 470_000, 1_060_000]
    records = [record(parameters=size) for size in sizes]
    del records[0]["variants"]["pseudo-0"]
    figure = figures.scaling(records)
    left, right = figure.axes
    ordered = [records[1], records[2], records[0]]
    for name in VARIANTS:
        having = [r["variants"] for r in ordered if name in r["variants"]]
        values = np.array([variants[name]["perplexity"]["values"] for variants in having])
        causal = np.array([variants["causal"]["perplexity"]["values"] for variants in having])
        close(ys(left, name), values.mean(1))
        np.testing.assert_allclose(xs(left, name), [0.47, 1.06, 8.4][: len(having)], rtol=0.1)
        np.testing.assert_allclose(ys(right, name), (100 * (values / causal - 1)).mean(1), atol=1e-9)
    assert len(xs(left, "pseudo-0")) == 2
    assert [text.get_text() for text in left.get_xticklabels()] == ["0.47 M", "1.06 M", "8.4 M"]


@pytest.mark.parametrize(("key", "value"), [("text", "wikitext-103"), ("length", 512), ("position", "alibi")])
def test_scaling_compares_like_with_like(key: str, value: Any):
    other = record()
    other["config"][key] = value
    with pytest.raises(ValueError, match=f"records must be of one {key} to be compared, got .*{value}.*draw them apart"):
        figures.scaling([record(), other])


def test_the_default_run_with_two_variants_and_one_seed(tmp_path: Path):
    drawn = record(["causal", "stablemask"], seeds=1, layers=2)
    for variant in drawn["variants"].values():
        del variant["maps"]
    (tmp_path / "lm_cpu2_202611.json").write_text(json.dumps(drawn))
    figures.main([str(tmp_path / "lm_cpu2_202611.json")])
    paths = sorted(tmp_path.glob("*.png"))
    assert [path.name for path in paths] == ["lm_cpu2_202611-share.png", "lm_cpu2_202611.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in paths)
    assert "one seed" in figures.overview(drawn).get_suptitle()


def test_texts_too_short_to_measure_shares_or_extrapolation():
    drawn = record(["causal", "stablemask"])
    titles = [axes.get_title().split()[0] for axes in figures.overview(drawn).axes]
    assert titles == ["validation:", "validation", "attention", "longer"]
    for variant in drawn["variants"].values():
        variant["extrapolation"] = None
    assert [axes.get_title().split()[0] for axes in figures.overview(drawn).axes] == titles[:3]
    for variant in drawn["variants"].values():
        variant["first_token_share"] = variant["pseudo_share"] = None
        del variant["maps"]
    figure = figures.overview(drawn)
    assert [axes.get_title().split()[0] for axes in figure.axes] == titles[:2]
    assert figure.get_figheight() < 4
    assert list(figures.of_run(drawn)) == [""]


def test_what_a_reader_needs_is_written():
    text = "\n".join(written(figures.overview(record())))
    for part in (
        "debian-reference",
        "1.06 M parameters",
        "RoPE",
        "length 256",
        "1000 steps",
        "3 seeds",
        "last 256 tokens",
        "nats per byte",
    ):
        assert part in text


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = [tmp_path / f"lm-{name}.json" for name in ("a", "b")]
    for path, parameters in zip(paths, (470_000, 1_060_000), strict=True):
        path.write_text(json.dumps(record(["causal", "stablemask"], parameters=parameters)))
    figures.main([str(path) for path in paths])
    printed = [Path(text) for text in capsys.readouterr().out.split()]
    suffixes = (".png", "-share.png", "-maps.png")
    assert [path.name for path in printed] == ["lm-a-scaling.png", *(f"lm-{x}{s}" for x in "ab" for s in suffixes)]
    assert all(path.parent == tmp_path and path.stat().st_size > 10_000 for path in printed)


def test_records_that_cannot_be_compared_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, text in (("a", "one"), ("b", "another")):
        drawn = record(["causal"])
        drawn["config"]["text"] = text
        (tmp_path / f"{name}.json").write_text(json.dumps(drawn))
    with pytest.raises(SystemExit):
        figures.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert "records must be of one text" in capsys.readouterr().err
    assert list(tmp_path.glob("*.png")) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "is no JSON"),
        ("[]", "is no record of benchmarks.lm: give the .json"),
        ('{"benchmark": "positions"}', "is no record of benchmarks.lm"),
        ('{"benchmark": "lm", "variants": {"causal": {"val_loss": 1.5, "tokens_per_s": 3}}}', "is no record of benchmarks.lm"),
    ],
)
def test_bad_records(content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "record.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as exit_:
        figures.main([str(path)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.glob("*.png")) == []
