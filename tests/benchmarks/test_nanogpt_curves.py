"""benchmarks.nanogpt_curves on the stand-in checkout: paired runs, what it writes, what it refuses."""

import json
from pathlib import Path

import pytest

from benchmarks import nanogpt_curves
from benchmarks.nanogpt_curves import Run, Size
from tests.helpers import ROOT

STAND_IN = ROOT / "tests" / "helpers" / "standins" / "nanogpt"
SMALL = Size(n_layer=1, n_head=3, n_embd=24, block_size=16, batch_size=2, eval_iters=1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"document {i}: " + "abc, abd; " * 9)
    return folder


def test_both_runs_of_a_seed_differ_in_the_attention_alone(text: Path, tmp_path: Path) -> None:
    """With gamma = inf they are one run, so weights and batches are the same; another seed is another run."""
    out = tmp_path / "out"
    before = sorted(STAND_IN.rglob("*.py"))
    options = ["--steps", "10", "--seeds", "2", "--gamma", "inf", "--text", str(text), "--out", str(out)]
    nanogpt_curves.main([str(STAND_IN), *options], SMALL)
    record = json.loads(next(out.glob("nanogpt_*.json")).read_text())
    first, same, second, again = record["runs"]
    assert [run["attn"] for run in record["runs"]] == ["causal", "stablemask"] * 2
    assert first["steps"] == list(range(9))
    assert len(first["milliseconds"]) == 8
    assert first["validation"] == same["validation"]
    assert second["validation"] == again["validation"]
    assert first["validation"] != second["validation"]
    assert first["validation"][-1] < first["validation"][0]
    page = next(out.glob("nanogpt_*.md")).read_text()
    assert f"| 0 | {first['validation'][-1]:.4f} | {first['validation'][-1]:.4f} | +0.0000 |" in page
    assert "StableMask ends lower for 0 of 2 seeds; StableMask minus causal: +0.0000 ± 0.0000" in page
    assert next(out.glob("nanogpt_*.png")).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(STAND_IN.rglob("*.py")) == before


def test_the_verdict_pairs_the_seeds_and_keeps_losses_in() -> None:
    ends = {("causal", 0): 2.0, ("stablemask", 0): 1.9, ("causal", 1): 1.5, ("stablemask", 1): 1.7}
    runs = [Run(attn, seed, [0], [9.0], [end], [10.0 + seed]) for (attn, seed), end in ends.items()]
    assert nanogpt_curves.verdict(runs).startswith(
        "StableMask ends lower for 1 of 2 seeds; StableMask minus causal: +0.0500 ± 0.2121 "
    )
    assert nanogpt_curves.table(runs).splitlines()[2:] == [
        "| 0 | 2.0000 | 1.9000 | -0.1000 | 10 / 10 |",
        "| 1 | 1.5000 | 1.7000 | +0.2000 | 11 / 11 |",
    ]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["nowhere"], "this is not a nanoGPT checkout: no train.py in nowhere"),
        ([str(STAND_IN), "--steps", "7"], "--steps must be at least 8, got 7"),
        ([str(STAND_IN), "--seeds", "0"], "--seeds must be at least 1, got 0"),
        ([str(STAND_IN), "--gamma", "steep"], "--gamma must be headwise"),
        ([str(STAND_IN), "--gamma", "1,2"], "one number for each of the model's 3 query heads, got 2"),
        ([str(STAND_IN), "--text", "nowhere"], "no such file or folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    options: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        nanogpt_curves.main(options, SMALL)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line


def test_a_run_that_fails_says_what_train_py_said(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = Size(n_layer=1, n_head=3, n_embd=24, block_size=10**6, batch_size=2, eval_iters=1)
    with pytest.raises(SystemExit) as stop:
        nanogpt_curves.main([str(STAND_IN), "--text", str(text), "--out", str(tmp_path / "out")], broken)
    assert stop.value.code == 2
    assert "train.py ended with exit code 1" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
