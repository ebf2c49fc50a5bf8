"""sm_flex_torchtitan's command line, as far as it goes without torchtitan; test_torchtitan.py has the rest."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from benchmarks import titan_speed
from sm_flex_torchtitan import train, versions
from tests.helpers.launching import refusal

MODEL = ["--module", "llama3", "--config", "llama3_debugmodel"]
ANY = "--attn must be given as stablemask, flex, flex_flash or varlen, got"
REFUSED = {
    "no attention": ([], f"{ANY} nothing"),
    "unknown attention": (["--attn", "sdpa"], f"{ANY} sdpa"),
    "no value": (["--attn"], f"{ANY} nothing"),
    "unknown flag": (["--attn.window=3"], "--attn.window is not known: --attn, --attn.gamma, --attn.length, --attn.learned are"),
    "gamma of flex": (["--attn=flex", "--attn.gamma=1"], "--attn.gamma belongs to --attn stablemask, got --attn flex"),
    "learned of flex": (["--attn=flex", "--attn.learned"], "--attn.learned belongs to --attn stablemask, got --attn flex"),
    "learned": (
        ["--attn=stablemask", "--attn.learned=yes"],
        "--attn.learned is given as it is, or as True or False, got 'yes'",
    ),
    "gamma": (["--attn=stablemask", "--attn.gamma=-1"], "--attn.gamma must be headwise, a number >= 0, or one for each head"),
    "length": (
        ["--attn=stablemask", "--attn.length", "2k"],
        "--attn.length must be a whole number, the training length, got '2k'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_flags_that_are_refused(name: str, capsys: pytest.CaptureFixture[str]):
    argv, message = REFUSED[name]
    assert refusal(lambda: train.main([*MODEL, *argv]), capsys).startswith(f"{train.PROG}: error: {message}")


def command(*argv: str) -> list[str]:
    return train._with_override(*train._take([*argv, *MODEL]))


@pytest.mark.parametrize(
    ("argv", "kwargs"),
    [
        (["--attn", "stablemask"], {"gamma": "headwise"}),
        (["--attn=stablemask", "--attn.gamma", ".50"], {"gamma": 0.5}),
        (["--attn=stablemask", "--attn.learned"], {"gamma": "headwise", "learned": True}),
        (["--attn=stablemask", "--attn.learned=False"], {"gamma": "headwise"}),
        (
            ["--attn", "stablemask", "--attn.gamma=1,0.25,inf", "--attn.length", "4096"],
            {"gamma": [1.0, 0.25, torch.inf], "length": 4096},
        ),
    ],
)
def test_what_torchtitan_is_told(argv: list[str], kwargs: dict):
    """One override, whose kwargs are read back as torchtitan reads them; the rest passes through untouched."""
    flag, ours, *rest = command(*argv)
    target, _, given = ours.partition("=")
    assert (flag, target, json.loads(given)) == ("--override.imports", "sm_flex_torchtitan.overrides.stablemask", kwargs)
    assert rest == MODEL


def test_a_backend_of_torchtitans_own():
    assert command("--attn", "flex")[:2] == [
        "--override.imports",
        'sm_flex_torchtitan.overrides.attention_backend={"name": "flex"}',
    ]
    assert command("--attn", "varlen")[0] == "--training.disable_cuda_graphs"


@pytest.mark.parametrize("theirs", [["--override.imports", "a.b", "c.d"], ["--override.imports=a.b", "c.d"]])
def test_overrides_of_the_users_own_stay(theirs: list[str]):
    given = command("--attn", "flex", "--training.steps", "3", *theirs)
    assert given[:3] == ["--training.steps", "3", "--override.imports"]
    assert given[3].startswith("sm_flex_torchtitan.overrides.attention_backend")
    assert given[4:] == ["a.b", "c.d", *MODEL]


@pytest.mark.parametrize(
    ("titan", "torch_version", "message"),
    [
        (None, "2.14.1", "torchtitan is not installed: pip install 'sm-flex[torchtitan]'"),
        ("0.4.0", "2.14.1", "sm_flex_torchtitan knows torchtitan 0.3, got 0.4.0: pip install 'torchtitan>=0.3,<0.4'"),
        ("0.3.1", "2.13.0", "torchtitan 0.3.1 needs torch 2.14 or newer, got 2.13.0: pip install 'torch>=2.14'"),
    ],
)
def test_versions(
    titan: str | None, torch_version: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def version(name: str) -> str:
        if titan is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return titan

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch, "__version__", TorchVersion(torch_version))
    with pytest.raises(ImportError) as error:
        versions.check_versions()
    assert str(error.value) == message
    assert refusal(lambda: train.main(["--attn", "stablemask", *MODEL]), capsys) == f"{train.PROG}: error: {message}"


def test_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    assert "--attn.gamma headwise" in capsys.readouterr().out


def test_the_benchmark_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = refusal(lambda: titan_speed.main(["--steps", "1", "--out", str(tmp_path)]), capsys)
    assert line == "python -m benchmarks.titan_speed: error: --steps must be at least 2, got 1"


@pytest.mark.parametrize(
    "said", [["--attn.learned", "False"], ["--attn.learned", "True"], ["--attn.learned=True"], ["--attn.learned"]]
)
def test_learned_may_be_said_in_one_word_or_two(said: list[str]) -> None:
    flags, rest = train._take(["--attn", "stablemask", *said, "--module", "llama3"])
    assert rest == ["--module", "llama3"]
    assert train._stablemask(flags).get("learned", False) is (said[-1] != "False")
