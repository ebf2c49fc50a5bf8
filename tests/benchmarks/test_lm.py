"""benchmarks.lm on a few short files: what it writes, that it learns and resumes, and what it refuses."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.lm import cli, train, why
from benchmarks.lm.model import Decoder
from benchmarks.lm.presets import PRESETS, Size, parameters
from benchmarks.lm.train import TrainingRun, learning_rate
from benchmarks.lm.variants import ALL
from tests.helpers import ROOT
from tests.helpers.lm import SMALL, corpus_of, run_of, write_folder

EVERY = [v.name for v in ALL]


@pytest.fixture
def not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs whose figures nobody looks at."""
    monkeypatch.setattr(cli.figures, "of_run", lambda record: {})


def run(folder: Path, *options: str, size: Size = SMALL) -> dict:
    """The record of a run in folder's parent."""
    home = folder.parent
    cli.main(["--text", str(folder), "--out", str(home / "out"), "--run", str(home / "run"), *options], size)
    (path,) = (home / "out").glob("lm*.json")
    return json.loads(path.read_text())


def losses(record: dict) -> dict[str, list[float]]:
    return {name: variant["loss"]["values"] for name, variant in record["variants"].items()}


def test_a_run_of_every_variant_writes_its_results(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run(folder, "--variants", "all", "--seeds", "2")
    found = record["variants"]
    assert list(found) == EVERY
    assert record["config"]["steps"] == 20
    assert record["config"]["training_documents"] == 20
    assert record["config"]["validation_documents"] == 3
    assert len({x for values in losses(record).values() for x in values}) == 2 * len(EVERY)  # none is another
    for name, variant in found.items():
        assert variant["seeds"] == [0, 1]
        steps, curve = variant["curve"]["steps"], variant["curve"]["loss"]
        assert steps == [6, 12, 18, 20]
        assert all(one[-1] < one[0] < math.log(302) for one in curve)
        assert variant["loss"]["values"] == [one[-1] for one in curve]
        assert variant["perplexity"]["mean"] > 1
        assert variant["tokens_per_s"]["min"] > 0
        assert set(variant["extrapolation"]["kept"]) == {"causal": {"0", "4"}, "token-learned": {"1"}}.get(name, {"0"})
        assert variant["extrapolation"]["times"] == [1, 2, 4, 8]
        layers = variant["first_token_share"]["by_layer"]
        assert len(layers) == 2
        assert len(layers[0]) == len(variant["first_token_share"]["positions"])
        assert ("maps" in variant) == (name in ("causal", "stablemask"))
        assert ("difference" in variant) == (name != "causal")
    out = folder.parent / "out"
    (page,) = out.glob("lm*.md")
    text = page.read_text()
    assert f"| StableMask, head-wise | 2 | {found['stablemask']['loss']['mean']:.4f} (" in text
    for key in ("device", "cores", "torch", "commit", "command", "date"):
        assert f"- {key}: " in text
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert path.name in text
    assert "4x" in text
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["variants"]["causal"] == found["causal"]["loss"]


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("name", EVERY)
def test_killed_at_any_step_it_goes_on_with_the_same_losses(name: str, position: str, folder: Path) -> None:
    """Before the first checkpoint, just after one, just before one: nothing is lost or repeated."""
    corpus, home = corpus_of(folder), folder.parent
    whole = run_of(corpus, name, home / "whole", position=position)
    train.train(whole)
    for at in (3, 7, 17):
        killed = run_of(corpus, name, home / f"killed{at}", position=position)

        def kill(run: TrainingRun, at: int = at) -> None:
            if len(run.training) == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train.train(killed, kill)
        again = run_of(corpus, name, home / f"killed{at}", position=position)
        train.train(again)
        assert again.training == whole.training
        assert again.validation == whole.validation
        weights = [torch.load(p.folder / "checkpoint.pt", weights_only=True)["model"] for p in (whole, again)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.usefixtures("not_drawn")
def test_a_process_that_is_killed_and_the_same_command_again(folder: Path, cache: Path) -> None:
    whole = run(folder)
    script = (
        "import os, signal, sys, dataclasses, pathlib\n"
        "sys.path[:0] = ['.', 'integrations']\n"
        "import torch; torch.set_num_threads(1)\n"
        "from tests.helpers.lm import SMALL, CPU\n"
        "from benchmarks import report\n"
        "from benchmarks.lm import cli, tokens, train\n"
        f"report.pick_device = lambda: CPU; tokens.CACHE = pathlib.Path({str(cache)!r})\n"
        "rate = train.learning_rate; taken = []\n"
        "def stop(step, size):\n"
        "    taken.append(step)\n"
        "    if len(taken) == 30: os.kill(os.getpid(), signal.SIGKILL)\n"  # the second variant, step 10
        "    return rate(step, size)\n"
        "train.learning_rate = stop\n"
        "cli.main(sys.argv[1:], SMALL)\n"
    )
    where = ["--out", str(folder.parent / "out2"), "--run", str(folder.parent / "run2")]
    command = [sys.executable, "-c", script, "--text", str(folder), *where]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -9, killed.stderr
    assert not list((folder.parent / "out2").glob("*.json"))
    cli.main(["--text", str(folder), *where], SMALL)
    (path,) = (folder.parent / "out2").glob("lm*.json")
    again = json.loads(path.read_text())
    for name in ("causal", "stablemask"):
        assert again["variants"][name]["curve"] == whole["variants"][name]["curve"]


@pytest.mark.usefixtures("not_drawn")
def test_finished_measures_what_is_there(folder: Path) -> None:
    whole = run(folder, "--seeds", "2")
    (folder.parent / "run" / "stablemask-seed1" / "checkpoint.pt").unlink()
    part = run(folder, "--seeds", "2", "--finished")
    assert part["variants"]["causal"]["loss"] == whole["variants"]["causal"]["loss"]
    assert losses(part)["stablemask"] == losses(whole)["stablemask"][:1]
    assert "fewer for StableMask, head-wise" in next((folder.parent / "out").glob("*.md")).read_text()


@pytest.mark.usefixtures("not_drawn")
def test_causal_is_stablemask_at_gamma_inf_and_any_gamma_is_taken(folder: Path) -> None:
    found = losses(run(folder, "--variants", "causal,stablemask-inf,stablemask-0,pseudo-0,stablemask-3"))
    assert found["causal"] == found["stablemask-inf"]
    assert found["pseudo-0"] == found["stablemask-0"]
    assert len({x[0] for x in found.values()}) == 3


def test_variants_of_a_seed_start_from_the_same_weights_and_seeds_differ(folder: Path) -> None:
    corpus = corpus_of(folder)
    states = [run_of(corpus, name, folder.parent, seed=seed).new_model().state_dict() for name in EVERY for seed in (0, 1)]
    for state in states[2::2]:
        assert all(torch.equal(state[key], states[0][key]) for key in states[0])
    assert not torch.equal(states[0]["head.weight"], states[1]["head.weight"])


def test_what_a_sink_carries_starts_at_0_and_does_not_decay(folder: Path) -> None:
    run = run_of(corpus_of(folder), "sink-value", folder.parent)
    model = run.new_model()
    values = [p for name, p in model.named_parameters() if name.endswith("sink_values")]
    assert [p.any().item() for p in values] == [False] * SMALL.layers
    optimizer = train.new_optimizer(model, run.size)
    assert {id(p) for p in values} <= {id(p) for p in optimizer.param_groups[1]["params"]}
    train.one_step(run, model, optimizer, torch.randint(300, (5, 14)), 1e-2)
    assert all(p.any() for p in values)


def test_rows_at_once_change_memory_and_nothing_else(folder: Path) -> None:
    corpus, rows = corpus_of(folder), torch.randint(300, (5, 14))
    models, found = [], []
    for at_once in (5, 2):
        run = run_of(corpus, "stablemask", folder.parent, size=replace(SMALL, at_once=at_once))
        models.append(run.new_model())
        found.append(train.one_step(run, models[-1], train.new_optimizer(models[-1], run.size), rows, 1e-2))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_learning_rate_by_hand() -> None:
    size = replace(SMALL, steps=14, warmup=4, first_lr=1.0, peak_lr=5.0, last_lr=0.0, decay="linear")
    assert [learning_rate(step, size) for step in range(14)] == [2, 3, 4, 5, *(5 - 0.5 * i for i in range(10))]
    size = replace(size, decay="cosine", last_lr=1.0)
    assert learning_rate(4, size) == 5
    assert learning_rate(9, size) == pytest.approx(3)
    assert learning_rate(14, size) == pytest.approx(1)


@pytest.mark.parametrize(("name", "millions"), [("71M", 70.3), ("160M", 162.2), ("400M", 237.2), ("1.4B", 1413.9)])
def test_presets_have_the_parameters_that_are_printed(name: str, millions: float) -> None:
    size = PRESETS[name]
    with torch.device("meta"):
        model = Decoder(size, ALL[0])
    assert sum(p.numel() for p in model.parameters()) == parameters(size) == pytest.approx(millions * 1e6, rel=1e-3)


def test_why_writes_its_results(folder: Path) -> None:
    home = folder.parent
    options = ["--text", str(folder), "--out", str(home / "out"), "--run", str(home / "why"), "--steps", "12", "--seeds", "1"]
    why.main(options, SMALL)
    (path,) = (home / "out").glob("lm-why_*.json")
    results = json.loads(path.read_text())["results"]
    assert len(results) == sum(len(setting.variants) for setting in why.SETTINGS)
    by_name = {(r["setting"], r["variant"]): r for r in results}
    ours = by_name["as benchmarks.lm", "stablemask"]
    assert ours["difference"][0][-1] == ours["loss"][0][-1] - by_name["as benchmarks.lm", "causal"]["loss"][0][-1] != 0
    assert by_name["as benchmarks.lm", "causal"]["share_at_start"] == 1
    assert 0 < ours["share_at_start"] < 1
    assert by_name["as benchmarks.lm", "stablemask-faded"]["share_at_start"] == pytest.approx(1, abs=1e-3)
    assert ours["loss"] != by_name["ten times the warm-up", "stablemask"]["loss"]


def _prepare(home: Path) -> None:
    (home / "empty").mkdir()
    (home / "binary.txt").write_bytes(b"\xff" * 5000)
    (home / "short.txt").write_text("too short")
    (home / "rubbish" / "causal-seed0").mkdir(parents=True)
    (home / "rubbish" / "causal-seed0" / "checkpoint.pt").write_text("rubbish")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "nowhere"], "no such file or folder"),
        (["--text", "empty"], "nothing to read"),
        (["--text", "binary.txt"], "nothing to read"),
        (["--text", "short.txt"], "too short: a batch takes 5 rows of 13 tokens"),
        (["--variants", "causal,dense"], "no such variant: dense; there are causal, stablemask,"),
        (["--variants", "stablemask-steep"], "no such variant: stablemask-steep"),
        (["--variants", "stablemask--1"], "no such variant: stablemask--1"),
        (["--variants", "0.5"], "did you mean stablemask-0.5?"),
        (["--variants", ""], "no such variant: ;"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--steps", "many"], "invalid int value"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--position", "learned"], "invalid choice"),
        (["--position", "alibi", "--variants", "causal,stablemask-rescaled"], "stablemask-rescaled is a study of rope alone"),
        (["--preset", "3B"], "invalid choice"),
        (["--dataset", "wikitext-103", "--text", "text"], "not allowed with"),
        (["--out", "short.txt"], "not a folder"),
        (["--run", "short.txt"], "not a folder"),
        (["--run", "rubbish"], "is no checkpoint of benchmarks.lm"),
        (["--finished"], "no training run is finished"),
        (["--layers", "2"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    options: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = folder.parent
    monkeypatch.chdir(home)
    _prepare(home)
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    text = [] if "--text" in options else ["--text", "text"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*text, "--out", "out", "--run", "run", *options], SMALL)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err
    after = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.usefixtures("not_drawn")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--steps", "21"], "was trained with steps = 20, and this run has 21: give another --run folder"),
        (["--position", "alibi"], "was trained with position = rope, and this run has alibi"),
        (["--text", "other"], "was trained with text = text, and this run has other"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_kept(
    changed: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    write_folder(Path("other"))
    common = ["--out", "out", "--run", "run", "--variants", "causal"]
    cli.main([*common, "--text", "text"], SMALL)
    before = {path: path.read_bytes() for part in ("out", "run") for path in Path(part).rglob("*") if path.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([*common, "--text", "text", *changed], SMALL)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    after = {path: path.read_bytes() for part in ("out", "run") for path in Path(part).rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.usefixtures("not_drawn")
def test_a_result_of_another_run_is_refused_and_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(folder, "--steps", "6")
    with pytest.raises(SystemExit) as stopped:
        run(folder, "--steps", "5", "--run", str(folder.parent / "another"))
    assert stopped.value.code == 2
    assert "is the result of another configuration, with steps 6 where this run has 5" in capsys.readouterr().err
    assert not (folder.parent / "another").exists()
    assert losses(run(folder, "--steps", "6", "--finished")) == losses(first)
