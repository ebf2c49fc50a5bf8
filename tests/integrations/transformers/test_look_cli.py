"""python -m sm_flex_transformers.look: what it writes, and what it refuses in one line with exit code 2."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, T5Config, T5ForConditionalGeneration
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from sm_flex_transformers.look import cli, page
from sm_flex_transformers.look.measure import LayerShares, Looked, cells_for, position_groups
from sm_flex_transformers.look.report import report_of
from sm_flex_transformers.look.texts import Rows
from tests.helpers.looking import TEXT, plain, saved, tokenizer
from tests.helpers.transformers_models import CONFIGS, model_of

FILES = ["first_token.png", "kinds.png", "norms.png", "report.html", "report.json", "windows.png"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its name holds what would end the page's script."""
    folder = tmp_path_factory.mktemp("models") / "a<!--<script>b"
    return saved(folder, model_of(plain(CONFIGS["llama-gqa"]()), "sdpa"))


def text_file(folder: Path, text: str | bytes = TEXT) -> str:
    path = folder / "text.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def data_of(html: str) -> dict[str, Any]:
    (found,) = re.findall(r"^const R = (\{.*\});$", html, re.M)
    return json.loads(found.replace("<\\!--", "<!--"))


@pytest.mark.parametrize("stablemask", [False, True])
def test_it_writes_a_table_pictures_figures_and_a_page(
    stablemask: bool, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    if stablemask:
        model = saved(tmp_path / "stablemask", model_of(CONFIGS["llama-gqa"](), "stablemask"))
    out = tmp_path / "deep" / "out"
    arguments = [str(model), "--text", text_file(tmp_path), "--out", str(out), "--length", "60", "--window", "20", "--rows", "2"]
    cli.main(arguments)
    assert sorted(path.name for path in out.iterdir()) == FILES
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text(), parse_constant=lambda x: pytest.fail(f"{x} is no JSON"))
    assert report["tokens"] == {"rows": 2, "length": 60, "far": 15, "window": 20, "kept": 4}
    assert report["model"] == model.name
    assert (report["real"]["mean"] < 1) == stablemask
    assert report["stablemask"] == (CONFIGS["llama-gqa"]().stablemask if stablemask else None)
    first = report["first"]
    assert [len(heads) for heads in first["by_head"]] == report["heads"] == [6, 6]
    assert f"{first['by_head'][0][0]:.6f}" not in printed  # it is a table of layers
    mean = sum(first["by_head"][1]) / 6
    (line,) = [line for line in printed.splitlines() if line.startswith("    1 ")]
    assert line.split()[1] == f"{mean:.3f}"
    assert f"{report['perplexity']['window']['late_perplexity']:,.2f}" in printed
    for name in FILES:
        if name.endswith(".png"):
            assert (out / name).read_bytes().startswith(b"\x89PNG")

    html = (out / "report.html").read_text()
    assert not re.search(r"""(src|href)=|@import|url\(|fetch\(|https?://(?!www\.w3\.org/2000/svg)""", html)
    assert "prefers-color-scheme: dark" in html
    found = data_of(html)
    assert found["first"]["by_head"] == first["by_head"]
    assert found["model"] == model.name
    cells = page.base64.b64decode(found["cells"]["bytes"])
    assert len(cells) == 12 * found["cells"]["size"] ** 2
    assert found["cells"]["size"] == 48
    assert cells[0] == round(255 * report["first"]["by_position"][0][0][0] ** 0.5)  # of slot 0 to itself


def test_a_page_of_a_very_large_model_stays_below_its_limit(tmp_path: Path) -> None:
    layers, heads, length = 128, 128, 512
    cells = cells_for(layers * heads, length)
    shares = []
    for i in range(layers):
        layer = LayerShares(str(i))
        layer.other_slots = [7] * 6
        groups = len(position_groups(length))
        layer.add(
            first=torch.rand(heads, groups), real=torch.rand(heads, groups), kinds=torch.rand(heads, 3),
            cells=torch.rand(heads, cells, cells), first_far=torch.rand(heads), real_far=torch.rand(heads),
            other=torch.rand(heads), other_mean=torch.rand(()),
        )  # fmt: skip
        shares.append(layer)
    ids = torch.full((6, length + 1), 3)
    losses = {name: torch.rand(6, length) for name in ("all keys", "window", "window, first kept")}
    looked = Looked(
        shares, torch.rand(layers + 1, 3), position_groups(length), 64, losses, Rows(ids, torch.full((6, length), 2)), 128, 4
    )
    model = model_of(plain(CONFIGS["llama"]()), "sdpa")
    page.write(report_of(looked, model, tokenizer(), "large", "text"), looked, tmp_path / "report.html")
    assert 3_000_000 < (tmp_path / "report.html").stat().st_size < 5_000_000
    assert cells_for(270, 8192) == 48
    assert cells_for(12, 7) == 7


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a call ends with."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = [line for line in re.split(r"[\r\n]", printed.err) if "error" in line]
    assert line.startswith("python -m sm_flex_transformers.look: error: ")
    assert printed.err.endswith(f"{line}\n")
    return line


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        ([], "a", "the text has 1 token: it must be longer than the window, 128"),
        ([], "", "the text has 0 tokens"),
        (
            [],
            TEXT[:90],
            "the text has 90 tokens: it must be longer than the window, 128.* give a longer text or a smaller --window",
        ),
        ([], b"a\0b" * 999, "text.txt is binary: it must be text in UTF-8"),
        ([], b"\xff\xfe\xe9" * 999, r"text.txt is no text in UTF-8 \(byte 0\)"),
        (["--window", "64"], TEXT, "a row of 64 tokens must be longer than the window, 64"),
        (["--length", "99", "--window", "9"], TEXT, "--length 99 is longer than the 64 positions of the model"),
        (["--window", "0"], TEXT, "--window must be at least 1, got 0"),
        (["--rows", "-1"], TEXT, "--rows must be at least 1, got -1"),
        (["--keep", "x"], TEXT, "invalid int value: 'x'"),
    ],
)
def test_bad_texts_and_numbers(
    arguments: list[str], text: Any, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = refusal(capsys, str(model), "--text", text_file(tmp_path, text), "--out", str(out), *arguments)
    assert re.search(message, line)
    assert not out.exists()


def test_a_text_or_a_model_that_is_not_there(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "missing")
    assert "missing cannot be read: No such file" in refusal(capsys, str(model), "--text", missing, "--out", str(tmp_path / "o"))
    assert "is no folder with a config.json" in refusal(capsys, missing, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    assert "full holds files, and nothing is written over" in refusal(capsys, str(model), "--out", str(tmp_path / "full"))
    assert "mine is a file: name a folder" in refusal(capsys, str(model), "--out", str(tmp_path / "full" / "mine"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_a_model_without_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "bare", model_of(plain(CONFIGS["llama"]()), "sdpa"), with_tokenizer=False)
    assert "bare has no tokenizer that can be loaded" in refusal(capsys, str(folder), "--out", str(tmp_path / "out"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_encoders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=48, num_layers=1, num_heads=6, d_kv=8, d_ff=40))
    arguments = "--text", text_file(tmp_path), "--window", "20", "--length", "60", "--out", str(tmp_path / "out")
    line = refusal(capsys, str(saved(tmp_path / "t5", t5)), *arguments)
    assert "is a t5 model: look takes decoder-only causal language models" in line
    bert = AutoModelForCausalLM.from_config(BertConfig(**sizes, intermediate_size=40))
    line = refusal(capsys, str(saved(tmp_path / "bert", bert)), *arguments)
    assert re.search("bidirectional|not causal|encoder", line)
    assert not (tmp_path / "out").exists()


def test_a_missing_matplotlib_is_said_before_anything_runs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest))
    monkeypatch.setattr(cli, "look", lambda *args, **kwargs: pytest.fail("it ran"))
    line = refusal(capsys, str(model), "--out", str(tmp_path / "out"))
    assert "matplotlib must be installed" in line
    assert "pip install 'sm-flex[bench]'" in line
