"""benchmarks.decode and benchmarks.finetune at a small size: what they measure, write and refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decode, finetune

SHAPE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZE = finetune.Size(layers=1, width=24, heads=2, length=16, rows=4, validation_rows=40)


def record(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_decode_writes_the_ratio_of_both_at_each_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decode.main(["--steps", "16", "--out", str(tmp_path)], SHAPE, (8, 24))
    found = record(capsys)
    assert set(found["ratios"]) == {"8", "24"}
    assert all(ratio["cache"] > 0 for ratio in found["ratios"].values())
    written = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [len(times) for times in written["ms"][decode.CAUSAL].values()] == [16, 16]
    assert [len(times) for times in written["ms"][decode.SCRATCH].values()] == [2, 2]
    assert "| *StableMask / causal, cache* |" in next(tmp_path.glob("*.md")).read_text()


def test_the_decode_steps_of_both_are_full_passes() -> None:
    """What is timed is right: the models share their weights, and a cached step gives the logits of the whole context."""
    made = decode.models(SHAPE, (8,), torch.device("cpu"))
    ids = torch.randint(decode.VOCABULARY, (1, 9))
    with torch.no_grad():
        causal, ours = (made[name](ids).logits for name in (decode.CAUSAL, decode.STABLEMASK))
        assert (causal - ours).abs().max() > 1e-4
        model, cache = made[decode.STABLEMASK], decode.cache_name(made[decode.STABLEMASK])
        step = model(ids[:, 8:], **{cache: model(ids[:, :8])[cache]}).logits
    torch.testing.assert_close(step[:, 0], ours[:, 8], rtol=1e-4, atol=1e-5)


def test_finetune_starts_from_the_causal_model_and_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("".join(f"line {i} of some text; " for i in range(400)))
    finetune.main(
        ["--text", str(tmp_path / "text.txt"), "--pretraining", "20", "--steps", "20", "--out", str(tmp_path / "out")], SIZE
    )
    (result,) = record(capsys)["results"]
    after = result["after"]
    assert after[finetune.CAUSAL]["0"] == pytest.approx(result["before"], rel=1e-5)
    assert after[finetune.SCHEDULED]["0"] == pytest.approx(result["before"], rel=1e-3)  # gamma 10 is all but causal
    assert after[finetune.AT_ONCE]["0"] != pytest.approx(result["before"], rel=1e-5)
    assert all(losses["20"] < losses["0"] for losses in after.values())


@pytest.mark.parametrize(
    ("module", "options", "why"),
    [
        (decode, ["--steps", "15"], "--steps must be at least 16, got 15"),
        (finetune, ["--steps", "0"], "--steps must be at least 1, got 0"),
        (finetune, ["--text", "nowhere"], "no such file or folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    module: Any, options: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        module.main(["--out", str(tmp_path / "out"), *options])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert why in printed.err
