"""python -m sm_flex_transformers.absorb: one line and exit code 2 for bad input, a folder and a table for good."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from sm_flex_transformers.absorb.cli import main
from tests.helpers.absorbing import causal, saved
from tests.helpers.sink_models import setting, with_sinks
from tests.integrations.transformers.test_absorb import gpt_oss

WORDS = "the cat sat on a mat, and ran away. " * 60  # 2,160 tokens
COMMON: dict[str, Any] = {"max_position_embeddings": 512}


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(WORDS)
    return str(tmp_path / "text.txt")


def test_a_model_is_absorbed(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path / "model", causal(**COMMON).float())
    main([str(model), "--out", str(tmp_path / "new"), "--text", text])
    said = capsys.readouterr().out
    assert "12 heads in 2 layers, on 2 rows" in said
    lines = {line[:34].strip(): [float(x) for x in line[34:].split()] for line in said.splitlines() if line[40:41].isdigit()}
    assert list(lines) == ["all keys", "window of 64, nothing kept", "window of 64 and the first 4"]
    assert all(math.isclose(after - before, change, abs_tol=2e-4) for before, after, change in lines.values())
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "new", attn_implementation="stablemask")
    assert len(new.config.stablemask["sink"]) == 2
    assert new.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "new")("cat")["input_ids"]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()  # progress bars of what was saved
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("python -m sm_flex_transformers.absorb: error: ")
    return said[0]


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("nowhere", "is no folder with a config.json"),
        ("encoder", "is a bert model: absorb takes decoder-only causal language models"),
        ("no tokenizer", "has no tokenizer that can be loaded"),
        ("absorbed", 'the model was absorbed already: its config.stablemask has a "sink"'),
        ("sinks", "GptOssForCausalLM has learned attention sinks of its own"),
    ],
)
def test_a_model_that_cannot_be_absorbed(
    tmp_path: Path, text: str, what: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    if what == "encoder":
        saved(folder, BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=61)))
    elif what == "no tokenizer":
        saved(folder, causal(), with_tokenizer=False)
    elif what == "absorbed":
        saved(folder, with_sinks(setting()))
    elif what == "sinks":
        model = gpt_oss()
        model.config.max_position_embeddings = 512
        saved(folder, model)
    assert why in refused(capsys, str(folder), "--out", str(tmp_path / "new"), "--text", text)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"a", "the text has 1 token: it must be longer than the window, 64"),
        (b"a cat", "the text has 5 tokens: it must be longer than the window, 64"),
        (b"a cat " * 60, "the text is good for 1 row of 359 tokens, and two of 256 are needed"),
        (b"\0\1", "is binary"),
        (b"\xff\xfe1", "is no text in UTF-8"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_text_that_cannot_be_used(tmp_path: Path, content: bytes | None, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path / "model", causal(**COMMON).float())
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    assert why in refused(capsys, str(model), "--out", str(tmp_path / "new"), "--text", str(tmp_path / "text"))
    assert not (tmp_path / "new").exists()


def test_nothing_is_written_over(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path / "model", causal(**COMMON).float())
    before = (model / "config.json").read_text()
    assert "holds files, and nothing is written over" in refused(capsys, str(model), "--out", str(model), "--text", text)
    assert "is a file: name a folder" in refused(capsys, str(model), "--out", text, "--text", text)
    assert (model / "config.json").read_text() == before


def test_wrong_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", str(tmp_path / "new"))
    assert "--window must be at least 1, got 0" in refused(capsys, "x", *out, "--window", "0")
    assert "--window 255 and --keep 4 must be less than a row of 256" in refused(capsys, "x", *out, "--window", "255")
