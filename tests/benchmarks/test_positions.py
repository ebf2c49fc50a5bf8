"""benchmarks.positions: honest counting, what a run writes, who solves the tasks, and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from benchmarks.positions import cli, limits
from benchmarks.positions.model import ROWS, Decoder, Size, sinusoidal, t5_bucket, urpe

SMALL = Size(layers=2, width=32, heads=4)
GENERATOR = torch.Generator


def run(out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    cli.main(["--out", str(out), "--seq-len", "8", *options])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def trained(row: str, task: int, length: int, steps: int) -> tuple[Decoder, list[float]]:
    with tqdm(disable=True) as bar, cli.one_thread():
        return cli.train(ROWS[row], task, length, steps=steps, seed=0, dtype=torch.float32, bar=bar, size=SMALL)


def test_a_run_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    record = run(tmp_path / "new" / "out", capsys, "--steps", "150", "--tasks", "1", "3", "--seeds", "2")
    assert list(record["rows"]) == ["rope", "rope+stablemask-headwise"]
    assert record["chance"] == {"1": 1 / 8, "3": 1 / 2}
    assert record["seq_len"] == 8
    ours = record["rows"]["rope+stablemask-headwise"]
    assert ours == {task: sum(by_seed) / 2 for task, by_seed in record["by_seed"]["rope+stablemask-headwise"].items()}
    assert ours["1"] == 1
    assert record["rows"]["rope"]["1"] < 0.4
    assert torch.get_num_threads() == threads
    png, text, machine_readable = (
        next((tmp_path / "new" / "out").glob(f"positions-8-float32_*.{kind}")) for kind in ("png", "md", "json")
    )
    assert png.read_bytes().startswith(b"\x89PNG")
    assert json.loads(machine_readable.read_text()).items() > record.items()
    assert "| rope+stablemask-headwise | 1.000 (1.000 to 1.000) |" in text.read_text()
    assert "| *chance* | *0.125* | *0.500* |" in text.read_text()


def test_a_seed_repeats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again = (run(tmp_path, capsys, "--steps", "8", "--tasks", "2", "--rows", "rope", "learned") for _ in range(2))
    assert first == again


@pytest.mark.parametrize("row", ["alibi", "t5", "rope"])
def test_a_relative_encoding_gives_equal_tokens_equal_rows(row: str) -> None:
    model, _ = trained(row, 1, 16, steps=20)
    logits_SC = model(torch.zeros(1, 16, dtype=torch.long))[0]
    torch.testing.assert_close(logits_SC, logits_SC[:1].expand_as(logits_SC), rtol=0, atol=1e-5)


@pytest.mark.parametrize("row", [row for row in ROWS if row not in ("alibi", "t5", "rope")])
def test_everything_else_tells_equal_tokens_apart(row: str) -> None:
    _, accuracy = trained(row, 1, 12, steps=200)
    assert sum(accuracy) / 12 > 0.9


def test_task_2_is_counted_at_the_marker_alone() -> None:
    class Nothing(torch.nn.Module):
        """Always says that nothing is marked, which is right at every position but one."""

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.zeros_like(tokens), 6).float()

    class Knows(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(tokens * torch.arange(1, 6), 6).float()

    def accuracy(model: torch.nn.Module) -> list[float]:
        return cli.accuracy(model, 2, 5, torch.float32, GENERATOR().manual_seed(0))

    assert accuracy(Nothing()) == [0.0] * 5
    assert accuracy(Knows()) == [1.0] * 5


def test_the_examples_by_hand() -> None:
    one, two, three = (cli.examples(task, 5, 7, GENERATOR().manual_seed(0)) for task in (1, 2, 3))
    assert one.tokens.tolist() == three.tokens.tolist() == [[0] * 5]
    assert one.targets.tolist() == [[0, 1, 2, 3, 4]]
    assert three.targets.tolist() == [[0, 1, 0, 1, 0]]
    assert one.counted.all()
    assert three.counted.all()
    assert two.tokens.shape == (7, 5)
    assert two.tokens.sum(1).tolist() == [1] * 7
    assert len({tuple(row) for row in two.tokens.tolist()}) > 1
    assert torch.equal(two.targets, two.tokens * torch.tensor([1, 2, 3, 4, 5]))
    assert torch.equal(two.counted, two.tokens == 1)


def test_chance_is_the_best_constant() -> None:
    assert cli.chance(1, 64) == cli.chance(2, 64) == 1 / 64
    assert cli.chance(3, 64) == 1 / 2
    assert cli.chance(3, 5) == 3 / 5  # of five positions three are even


def test_the_encodings_by_hand() -> None:
    assert t5_bucket(torch.tensor([0, 1, 15, 16, 17, 127, 128, 10_000])).tolist() == [0, 1, 15, 16, 16, 31, 31, 31]
    table = sinusoidal(3, 4)
    assert table[2].tolist() == pytest.approx([math.sin(2), math.cos(2), math.sin(2e-2), math.cos(2e-2)])
    # URPE with a T of ones is causal attention; then each weight is scaled by its own t[i - j].
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    causal = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)
    torch.testing.assert_close(urpe(q[None], k[None], v[None], torch.ones(2, 5)), causal)
    first = torch.zeros(2, 5)
    first[:, 3] = 2  # only keys three steps back are kept
    out = urpe(q[None], torch.zeros_like(k)[None], v[None], first)
    torch.testing.assert_close(out[0, 0, :, 4], 2 / 5 * v[0, :, 1])
    assert (out[0, 0, :, :3] == 0).all()


def test_one_layer_of_uniform_gamma_saturates_where_the_design_says() -> None:
    """With all scores 0 and gamma 0.5: row 29 in float32 and row 9 in bf16."""
    model = Decoder(ROWS["rope+stablemask-uniform"], Size(layers=1), 64, 64)
    for parameter in model.blocks[0].attention.qkv.parameters():  # pyright: ignore[reportAttributeAccessIssue]
        torch.nn.init.zeros_(parameter)
    assert limits.saturated_row(model, 64, torch.float32) == 29
    assert limits.saturated_row(model, 64, torch.bfloat16) == 9


def test_the_limits_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits.main(["--steps", "2", "--seeds", "2", "--out", str(tmp_path)], (6, 10))
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(record["trials"]) == 2 * 14
    assert all(len(trial["accuracy"]) == 2 for trial in record["trials"])
    assert {len(trial["saturated"]) for trial in record["trials"] if trial["layers"] == 1} == {2}
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".md", ".png"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--rows", "rope", "rotary"], "invalid choice: 'rotary' (choose from"),
        (["--tasks", "1", "4"], "invalid choice: 4 (choose from"),
        (["--tasks", ","], "invalid int value: ','"),
        (["--seq-len", "1"], "--seq-len must be at least 2, got 1"),
        (["--steps", "-1"], "--steps must be at least 0, got -1"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--steps", "many"], "invalid int value"),
        (["--dtype", "float16"], "invalid choice"),
        (["--out", "pyproject.toml"], "not a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    options: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--out", str(tmp_path / "out"), *options])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert why in printed.err
    assert list(tmp_path.iterdir()) == []
