"""sm_flex_nanogpt on a stand-in checkout: what the scripts compute, what a checkpoint remembers, what is refused."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sm_flex_nanogpt import launcher
from tests.helpers.launching import Checkout, checked_out, refusal, write_text

CHECKPOINT = Path("out/ckpt.pt")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkout]:
    with checked_out("nanogpt", tmp_path / "nanoGPT", monkeypatch) as made:
        write_text(made.folder / "data" / "text")
        yield made


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Standard output, without the times and without the launcher's own line."""
    lines = [re.sub(r"time .*?ms", "", line) for line in capsys.readouterr().out.splitlines()]
    return [line for line in lines if not line.startswith("attention: ")]


def test_causal_is_the_script_untouched_and_infinite_gamma_equals_it(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--max_iters=6", "--eval_interval=3", "--out_dir=out")
    checkout.plain("train.py", *options)
    plain, plain_checkpoint = printed(capsys), torch.load(CHECKPOINT)
    checkout.run(launcher.main, "train.py", "--attn=causal", *options)
    assert printed(capsys) == plain
    causal_checkpoint = torch.load(CHECKPOINT)
    assert causal_checkpoint["model_args"] == plain_checkpoint["model_args"]
    for name, weight in causal_checkpoint["model"].items():
        assert torch.equal(weight, plain_checkpoint["model"][name])
    checkout.run(launcher.main, "train.py", *options, "--attn=stablemask", "--gamma=inf")
    assert printed(capsys) == plain
    checkout.run(launcher.main, "train.py", "--attn=stablemask", *options)
    assert printed(capsys) != plain


def test_the_command_modifies_nothing_and_the_scripts_own_parser_works(checkout: Checkout) -> None:
    (checkout.folder / "config").mkdir()
    (checkout.folder / "config" / "tiny.py").write_text("n_head = 2\nn_embd = 16\ndropout = 0.2\n")
    before = checkout.hashes()
    run = checkout.python(
        "-m", "sm_flex_nanogpt", "train.py", "config/tiny.py", "--attn=stablemask", "--max_iters=9", "--gamma=0.5,0.1"
    )
    assert run.returncode == 0, run.stderr
    assert "argument 1 ['config/tiny.py']" in run.stdout
    assert "iter 9: loss" in run.stdout
    assert checkout.hashes() == before
    saved = torch.load(checkout.folder / CHECKPOINT)
    assert saved["config"]["dropout"] == 0.2
    assert saved["model_args"]["n_head"] == 2
    assert saved["model_args"]["attn"] == "stablemask with gamma 0.5,0.1"
    sample = checkout.python("-m", "sm_flex_nanogpt", "sample.py", "--attn=causal")
    assert sample.returncode == 2
    assert len(sample.stderr.splitlines()) == 1
    assert checkout.hashes() == before


def test_bench_runs_compiled_and_agrees_with_itself_eager(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    losses = []
    for options in (("--attn=stablemask",), ("--attn=stablemask", "--compile=False"), ("--attn=causal", "--compile=False")):
        checkout.run(launcher.main, "bench.py", *options)
        losses.append(float(printed(capsys)[-1].removeprefix("loss ").split(",")[0]))
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)
    assert losses[2] != pytest.approx(losses[1], abs=2e-6)


def test_a_checkpoint_remembers_its_attention(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(*options: str) -> str:
        checkout.run(launcher.main, "sample.py", *options)
        return printed(capsys)[-1]

    checkout.run(launcher.main, "train.py", "--attn=stablemask", "--gamma=0.50", "--max_iters=20", "--eval_interval=10")
    ours = sample("--attn=stablemask", "--gamma=.5")
    assert ours.startswith("sampled")
    for other, name in (
        (("--attn=causal",), "causal"),
        (("--attn=stablemask",), "stablemask with gamma headwise"),
        (("--attn=stablemask", "--gamma=1"), "stablemask with gamma 1"),
    ):
        for script in (("sample.py",), ("train.py", "--init_from=resume", "--max_iters=30")):
            line = refusal(lambda script=script, other=other: checkout.run(launcher.main, *script, *other), capsys)
            assert f"trained with stablemask with gamma 0.5, not {name}:" in line
        assert sample(*other, "--switch_attn").startswith("sampled")


def test_resume_goes_on_and_a_switched_checkpoint_remembers_the_new_attention(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ("train.py", "--eval_interval=10")
    checkout.run(launcher.main, *train, "--attn=stablemask", "--max_iters=10")
    capsys.readouterr()
    resume = (*train, "--init_from=resume", "--max_iters=20")
    checkout.run(launcher.main, *resume, "--attn=stablemask")
    lines = printed(capsys)
    assert lines[0].startswith("step 10:")
    assert any(line.startswith("iter 20:") for line in lines)
    assert torch.load(CHECKPOINT)["model_args"]["attn"] == "stablemask with gamma headwise"
    checkout.run(launcher.main, *resume, "--attn=causal", "--switch_attn")
    assert "attn" not in torch.load(CHECKPOINT)["model_args"]
    line = refusal(lambda: checkout.run(launcher.main, *resume, "--attn=stablemask"), capsys)
    assert "trained with causal, not stablemask with gamma headwise:" in line


def test_without_the_launcher_sample_stops_at_a_checkpoint_that_is_not_causal(checkout: Checkout) -> None:
    checkout.run(launcher.main, "train.py", "--attn=stablemask")
    with pytest.raises(TypeError, match="attn"):
        checkout.plain("sample.py")


def test_pretrained_weights_are_taken_and_cropped(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    checkout.run(launcher.main, "train.py", "--init_from=gpt2", "--block_size=8", "--attn=stablemask")
    saved = torch.load(CHECKPOINT)["model_args"]
    assert (saved["block_size"], saved["attn"]) == (8, "stablemask with gamma headwise")
    capsys.readouterr()
    for attn in ("causal", "stablemask"):
        checkout.run(launcher.main, "sample.py", "--init_from=gpt2", f"--attn={attn}")
    first, second = printed(capsys)
    assert first != second


def test_other_files_are_saved_and_loaded_as_they_are(checkout: Checkout) -> None:
    (checkout.folder / "other.py").write_text(
        "import torch\nthing = {'model': 1, 'model_args': 2}\ntorch.save(thing, 'out.pt')\nassert torch.load('out.pt') == thing\n"
    )
    save, load = torch.save, torch.load
    checkout.run(launcher.main, "other.py", "--attn=stablemask")
    assert torch.load("out.pt") == {"model": 1, "model_args": 2}
    assert (torch.save, torch.load) == (save, load)


def test_two_processes_train_one_model(checkout: Checkout) -> None:
    run = checkout.python(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "-m", "sm_flex_nanogpt", "train.py", "--attn=stablemask", "--max_iters=3",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    ends = re.findall(r"rank (\d) of 2 ended with ([\d.]+)", run.stdout)
    assert sorted(rank for rank, _ in ends) == ["0", "1"]
    assert ends[0][1] == ends[1][1]
    assert torch.load(checkout.folder / CHECKPOINT)["model_args"]["attn"] == "stablemask with gamma headwise"


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        ((), "--attn must be given as causal or stablemask, got nothing"),
        (("train.py",), "--attn must be given as causal or stablemask, got nothing"),
        (("train.py", "--attn=flash"), "got flash"),
        (("train.py", "--attn", "stablemask"), "--attn takes its value after an equals sign"),
        (("--attn=causal",), "name nanoGPT's script first"),
        (("--device=cpu", "train.py", "--attn=causal"), "name nanoGPT's script first"),
        (("tune.py", "--attn=causal"), "not a nanoGPT checkout: no tune.py in"),
        (("train.py", "--attn=stablemask", "--gamma=-1"), "got '-1'"),
        (("train.py", "--attn=stablemask", "--gamma=nan"), "got 'nan'"),
        (("train.py", "--attn=stablemask", "--gamma="), "got ''"),
        (("train.py", "--attn=stablemask", "--gamma=1,,2"), "got '1,,2'"),
        (
            ("train.py", "--attn=stablemask", "--gamma=1,2"),
            "--gamma must have one number for each of the model's 3 query heads, got 2",
        ),
        (("train.py", "--attn=causal", "--gamma=1"), "--gamma belongs to --attn=stablemask"),
        (("train.py", "--attn=causal", "--switch_attn=yes"), "--switch_attn is given as it is, or as True or False"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: tuple[str, ...], why: str, checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(lambda: checkout.run(launcher.main, *argv), capsys)
    assert line.startswith("python -m sm_flex_nanogpt: error: ")
    assert why in line
    assert not CHECKPOINT.exists()


@pytest.mark.parametrize("missing", ["model.py", "configurator.py", "train.py"])
def test_a_folder_that_is_no_checkout_is_refused(missing: str, checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout.folder / missing).unlink()
    line = refusal(lambda: checkout.run(launcher.main, "train.py", "--attn=stablemask"), capsys)
    assert f"this is not a nanoGPT checkout: no {missing} in" in line


WINDOW = "torch.ones(length, length).tril().triu(-63).bool()"


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("class CausalSelfAttention", "class Attention", "has not the interface of nanoGPT's"),
        ("self.c_proj = ", "self.proj = ", "has not the interface of nanoGPT's"),
        ("attn_mask=None,", "attn_mask=None, scale=0.1,", "is not plain causal attention"),
        ("is_causal=True", "is_causal=False", "is not plain causal attention"),
        ("q, k, v = (", "k, q, v = (", "is not plain causal attention"),
        # a window of 64 tokens, and a weight that starts at 0 and does nothing yet
        ("attn_mask=None, dropout_p=p, is_causal=True", f"attn_mask={WINDOW}, dropout_p=p", "is not plain causal attention"),
        ("self.flash = True", "self.gate = nn.Parameter(torch.zeros(3))", "is not plain causal attention"),
    ],
)
def test_an_attention_that_would_lose_something_is_refused(
    old: str, new: str, why: str, checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkout.folder / "model.py"
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    line = refusal(lambda: checkout.run(launcher.main, "train.py", "--attn=stablemask"), capsys)
    assert why in line


def test_of_several_processes_the_first_reports(
    checkout: Checkout, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        checkout.run(launcher.main, "train.py", "--attn=flash")
    assert stop.value.code == 2
    assert capsys.readouterr().err == ""
