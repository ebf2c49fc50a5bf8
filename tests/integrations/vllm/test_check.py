"""python -m sm_flex_vllm check: what of it needs no vLLM."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from transformers import LlamaConfig

from sm_flex_transformers import settings
from sm_flex_vllm import check


def test_the_check_says_why_vllm_would_not_load_the_plugin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """vLLM itself logs a line at most, and serves causal attention."""

    def broken() -> None:
        raise ImportError("no such library")

    point = SimpleNamespace(name="sm_flex", load=broken)
    monkeypatch.setattr(check, "entry_points", lambda group: [point])
    for allowed, words in ((None, "ImportError: no such library"), ("lora", "VLLM_PLUGINS='lora' leaves out sm_flex")):
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        if allowed:
            monkeypatch.setenv("VLLM_PLUGINS", allowed)
        with pytest.raises(SystemExit, match="1"):
            check.main(["check", "model"])
        assert words in capsys.readouterr().out
    monkeypatch.setattr(check, "entry_points", lambda group: [])
    with pytest.raises(SystemExit, match="1"):
        check.main(["check", "model"])
    assert "no installed distribution has the entry point" in capsys.readouterr().out


def test_a_refusal_at_start_is_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LlamaConfig(num_attention_heads=8)
    config.stablemask = {"sink": 1.0}
    config.save_pretrained(tmp_path)

    def refused(*_: Any) -> NoReturn:
        raise NotImplementedError("config.stablemask is set,\nand CPU_ATTN does not serve it")

    monkeypatch.setattr(check, "why_not_loaded", lambda: None)
    monkeypatch.setattr(check, "_ask_vllm", refused)
    monkeypatch.setattr(check, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    with pytest.raises(SystemExit, match="1"):
        check.main(["check", str(tmp_path)])
    expected = "NOT SERVED: vLLM does not start with it: config.stablemask is set, and CPU_ATTN does not serve it\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["check"],
        ["check", "model", "--tokens", "1"],
        ["check", "model", "--engine", "{"],
        ["check", "model", "--engine", "[1]"],
        ["check", "model", "--dtype", "auto"],
    ],
    ids=str,
)
def test_the_check_takes_no_bad_input(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        check.main(argv)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_check_takes_the_settings_that_vllm_is_given(tmp_path: Path) -> None:
    """A checkpoint of torchtitan has none of its own."""
    config = LlamaConfig(num_attention_heads=8)
    config.save_pretrained(tmp_path)
    asked = {"gamma": 0.5, "length": 32}
    assert settings.of(check._config(str(tmp_path), None)) is None
    assert settings.of(check._config(str(tmp_path), {"stablemask": asked})) == asked
