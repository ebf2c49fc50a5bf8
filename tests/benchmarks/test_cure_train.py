"""benchmarks.cure on a tiny Llama: training that is killed and resumed, and the command itself."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cure import cli, figures, measures, stages, train
from benchmarks.cure.model import attentions
from benchmarks.cure.variants import ALL
from benchmarks.cure.views import WHOLE
from sm_flex import headwise_gamma
from tests.helpers.cure import HEADS, SMALL, run_of, tiny, write_text


@pytest.mark.parametrize("name", ["evicted-value", "annealed", "learned", "penalty-mass-value"])
def test_a_killed_run_goes_on_with_the_losses_it_would_have_had(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    whole = run_of(name, tiny_llama, tmp_path / "whole")
    there = train.train(whole).state_dict()

    class KilledError(Exception):
        pass

    def kill(run: train.TrainingRun) -> None:
        if len(run.training) == 3:
            raise KilledError

    with pytest.raises(KilledError):
        train.train(run_of(name, tiny_llama, tmp_path / "killed"), kill)
    killed = run_of(name, tiny_llama, tmp_path / "killed")
    killed.load()
    assert len(killed.training) == 2
    assert not killed.done
    here = train.train(killed).state_dict()
    assert killed.done
    assert killed.training == whole.training
    assert killed.norms == whole.norms
    assert all(torch.equal(there[key], here[key]) for key in there)
    assert not torch.equal(there["model.layers.0.mlp.up_proj.weight"], tiny(tiny_llama).model.layers[0].mlp.up_proj.weight)
    assert torch.equal(there["model.embed_tokens.weight"], tiny(tiny_llama).model.embed_tokens.weight)


def test_a_finished_run_gives_back_the_model_and_the_mass_that_it_was_trained_to(
    tiny_llama: Path, tmp_path: Path, rows_RL: Tensor
) -> None:
    run = run_of("learned", tiny_llama, tmp_path / "run")
    trained = train.train(run)
    again = run_of("learned", tiny_llama, tmp_path / "run").trained_model()
    assert torch.equal(measures.losses(trained, rows_RL, WHOLE), measures.losses(again, rows_RL, WHOLE))
    gammas = torch.tensor([module.config.stablemask["gamma"] for module in attentions(again)])
    torch.testing.assert_close(gammas, again.log_gamma_LH.detach().exp())
    assert (gammas - headwise_gamma(HEADS)).abs().min() > 1e-6  # every one was trained


def test_a_checkpoint_of_another_configuration_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    train.train(run_of("causal", tiny_llama, tmp_path / "run"))
    with pytest.raises(ValueError, match="was trained with order = 0, and this run has 1"):
        run_of("causal", tiny_llama, tmp_path / "run", order=1).load()
    (tmp_path / "run" / train.WEIGHTS).write_text("no weights")
    with pytest.raises(ValueError, match="is no checkpoint of benchmarks"):
        run_of("causal", tiny_llama, tmp_path / "run").load()


def test_a_folder_that_another_process_holds_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    run, seen = run_of("causal", tiny_llama, tmp_path / "run"), []
    with train.held(tmp_path / "run") as mine:
        assert mine
        train.train_all([run], lambda run, model: seen.append(run))
        assert not run.training
    train.train_all([run], lambda run, model: seen.append(run))
    assert run.done
    assert seen == [run]


def test_the_penalty_counts_norms_above_four_medians() -> None:
    states = [torch.zeros(1, 5, 3) for _ in range(4)]
    for x in states:
        x[..., 0] = torch.tensor([80.0, 1.0, 1.0, 1.0, 1.0])  # the median is 1
    states[1][0, 0, 0] = 4.0  # the first of the two layers that count
    expected = (0.0 + math.log(80 / 4)) / 2
    assert train.excess(states).item() == pytest.approx(expected, rel=1e-6)


def test_the_plan_trains_the_first_order_of_all_first_and_the_long_ones_last() -> None:
    runs = cli.plan(ALL, SMALL, 2, 9)
    assert [run[0] for run in runs[: len(ALL)]] == list(ALL)
    assert {order for _, order, _ in runs[: len(ALL)]} == {0}
    assert [variant.kind for variant, order, _ in runs if order == 1] == ["main"] * 11
    assert [(variant.name, steps) for variant, _, steps in runs[-4:]] == [(name, 9) for name in cli.LONG]


def test_the_command_writes_its_tables_and_figures_and_trains_nothing_twice(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        "--model",
        str(tiny_llama),
        "--text",
        str(write_text(tmp_path / "text")),
        "--variants",
        "causal,evicted-mass,headwise,alone-mass",
    ]
    options += ["--steps", "2", "--orders", "2", "--long", "3", "--rows", "3", "--long-rows", "2"]
    options += ["--run", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    cli.main(options, SMALL)
    record = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert list(record["variants"]) == [
        "causal",
        "evicted-mass",
        "headwise",
        "alone-mass",
        "causal-3",
        "evicted-mass-3",
        "headwise-3",
    ]
    assert record["variants"]["causal"]["orders"] == [0, 1]
    assert record["variants"]["alone-mass"]["orders"] == [0]
    assert len(record["training"]["causal-3"]["nats"][0]) == 3
    assert len(record["untrained"]) == 6
    assert record["stream"]["untrained-mass-value"]["nats"][0][0] > 0
    page = next((tmp_path / "out").glob("*.md")).read_text()
    for title in ("The illness", "The switch", "The cure", "Where attention went", "Longer", "Streaming", "Rounded to int8"):
        assert f"## {title}" in page
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    causal, mass = (record["variants"][name]["losses"] for name in ("causal", "evicted-mass"))
    value, error = measures.paired(mass["own"]["all"], causal["whole"]["all"])
    assert f"| {value:+.4f} ({error:.4f}) |" in page

    def trains(*args: Any) -> None:
        raise AssertionError("trained or measured again")

    monkeypatch.setattr(train, "one_step", trains)
    monkeypatch.setattr(measures, "losses", trains)
    cli.main(options, SMALL)
    again = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert {**again, "source": 0} == {**record, "source": 0}
    capsys.readouterr()
    figures.main([str(next((tmp_path / "out").glob("*.json")))])
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--variants", "causal,cured"], "--variants: no such variant: cured"),
        (["--model", "nowhere"], "--model: no such file or folder: nowhere"),
        (["--model", "{text}"], "has no config.json: give a folder that save_pretrained wrote, or a .gguf file"),
        (["--model", "{text}/0.txt"], "is neither a folder of Transformers nor a .gguf file"),
        (["--text", "{text}/0.txt", "--model", "{model}"], "is too short: it takes documents of more than 32 tokens"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], why: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text")
    (text / "0.txt").write_text("word1 word2")
    options = [option.format(text=text, model=tiny_llama) for option in options]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--out", str(tmp_path / "out"), "--run", str(tmp_path / "runs"), *options], SMALL)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line


def test_rows_measured_before_are_not_mixed_with_others(tmp_path: Path, rows_RL: Tensor) -> None:
    ours, other = (stages.HeldOut(rows, rows_RL[:0], 8) for rows in (rows_RL, rows_RL[1:]))
    stages._kept(tmp_path / "x.json", ours, lambda: [1.0])
    assert stages._kept(tmp_path / "x.json", ours, lambda: [2.0]) == [1.0]
    assert stages.read(tmp_path / "x.json", other) is None
    assert stages._kept(tmp_path / "x.json", other, lambda: [2.0]) == [2.0]
