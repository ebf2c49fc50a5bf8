"""benchmarks.gpt_oss at a small size: what it measures, writes and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from benchmarks import gpt_oss
from sm_flex_transformers.attention import sm_flex_attention


def test_it_writes_the_ratio_of_each_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt_oss.main(["--seconds", "0", "--out", str(tmp_path)], (48, 160))
    ratios = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {f"{layer} {dtype} {length}" for layer in ("full", "window") for dtype in ("fp32", "bf16") for length in (48, 160)} < {
        *ratios
    }
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert len(rows) == 16
    assert all(len(row["ms"]["forward"]) == 5 and row["peak"] > 0 and row["error"] < 0.04 for row in rows)
    assert "| window | bf16 | 160 | sm_flex |" in next(tmp_path.glob("*.md")).read_text()


@pytest.mark.parametrize("layer", gpt_oss.LAYERS)
def test_a_wrong_layer_is_not_timed(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention with other sinks."""

    def with_other_sinks(*args: Any, s_aux: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return sm_flex_attention(*args, s_aux=s_aux + 0.1, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, gpt_oss.OURS, with_other_sinks)
    case = gpt_oss.Case(layer, "fp32", 48)
    with pytest.raises(ValueError, match="sm_flex is wrong"):
        gpt_oss.error_of(case, gpt_oss.OURS, torch.device("cpu"))
    assert gpt_oss.error_of(case, gpt_oss.EAGER, torch.device("cpu")) < 1e-4


def test_what_would_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt_oss, "free_memory", lambda device: 0)
    rows = gpt_oss.measure((16, 32), 0, torch.device("cpu"))
    assert {row["length"] for row in rows if "why" in row} == {32}
    assert all("not run" in row["why"] for row in rows if "why" in row)
