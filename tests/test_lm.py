"""benchmarks.lm on a few short files: what it writes, that it learns, that documents are apart, and what it refuses."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import lm, lm_text
from benchmarks.lm_model import Decoder, Size
from sm_flex import headwise_gamma, stablemask

SMALL = Size(layers=2, width=24, heads=3, length=29, rows=5, validation_rows=7, validations=3, peak_lr=1e-2)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _on_one_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors this small gain nothing from a second core, and lose much where that core is busy."""
    monkeypatch.setattr(lm, "pick_device", lambda: CPU)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """23 different short documents, one of them twice, and one file that is no text."""
    folder = tmp_path / "text"
    (folder / "deeper").mkdir(parents=True)
    for i in range(23):
        (folder / ("deeper" if i % 2 else ".") / f"{i}.txt").write_text(f"document {i}\n" + "abc, abc, abcd; " * (3 + i % 5))
    (folder / "again.txt").write_bytes((folder / "0.txt").read_bytes())
    (folder / "picture.bin").write_bytes(b"\xff\xfe\x00\x81" * 100)
    return folder


def record_of(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def run(folder: Path, out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    lm.main(["--text", str(folder), "--out", str(out), "--steps", "40", *options], SMALL)
    return record_of(capsys)


def losses(record: dict) -> list[float]:
    return [record["variants"][name]["val_loss"] for name in ("causal", "stablemask")]


def test_a_run_learns_and_writes_its_results(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    record = run(folder, out, capsys)
    causal, ours = losses(record)
    assert 0 < causal < 3.5 < math.log(256)
    assert 0 < ours < 3.5
    assert causal != ours
    assert all(variant["tokens_per_s"] > 0 for variant in record["variants"].values())
    assert record["config"]["steps"] == 40
    assert record["config"]["training_documents"] == 20
    assert record["config"]["validation_documents"] == 3
    png, text, machine_readable = (next(out.glob(f"lm_cpu*.{kind}")) for kind in ("png", "md", "json"))
    assert len(list(out.iterdir())) == 3
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert json.loads(machine_readable.read_text()).items() > record.items()
    page = text.read_text()
    assert f"| causal | {causal:.4f} |" in page
    assert f"| stablemask | {ours:.4f} |" in page
    assert png.name in page
    for key in ("device", "cores", "torch", "commit", "command", "date"):
        assert f"- {key}: " in page


def test_a_seed_repeats_and_another_differs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (losses(run(folder, tmp_path / "out", capsys, "--seed", seed)) for seed in ("3", "3", "4"))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_causal_is_stablemask_at_gamma_inf_and_a_number_is_taken(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    causal, ours = losses(run(folder, tmp_path / "out", capsys, "--gamma", "inf"))
    assert causal == ours
    same, half = losses(run(folder, tmp_path / "out", capsys, "--gamma", "0.5"))
    assert same == causal != half


def test_both_variants_start_from_the_same_weights_at_ln_256() -> None:
    causal, ours = (lm.new_variant("", gamma, SMALL, 5, CPU).model for gamma in (math.inf, 0.5))
    pairs = zip(causal.state_dict().values(), ours.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    rows_RL = lm_text.cut_rows([b"some text, " * 20], SMALL.length)
    assert causal.loss(lm_text.pack(rows_RL, CPU)).item() == pytest.approx(math.log(256), rel=1e-6)


@pytest.mark.parametrize("gamma", [math.inf, "headwise"])
def test_a_changed_document_leaves_the_others_alone(gamma: float | str) -> None:
    mask = stablemask(headwise_gamma(SMALL.heads) if gamma == "headwise" else math.inf, length=SMALL.length)
    torch.manual_seed(0)
    model = Decoder(SMALL, mask)
    for parameter in model.parameters():  # also those that start at 0
        torch.nn.init.normal_(parameter, std=0.3)

    def logits(*documents: bytes) -> tuple[torch.Tensor, lm_text.Packed]:
        batch = lm_text.pack(lm_text.cut_rows(list(documents), SMALL.length), CPU)
        with torch.no_grad():
            return model(batch), batch

    # 2 rows of 29: document 0 at 0..10, document 1 at 11..46 cut at 29, document 2 at 47..57, and the target of 57.
    a = logits(b"0123456789", b"a" * 35, b"0123456789", b"")
    b = logits(b"012345678X", b"a" * 35, b"0123456789", b"")
    assert a[1].cu_seqlens.tolist() == [0, 11, 29, 47, 58]
    changed_T = (a[0] != b[0]).any(dim=1)
    assert changed_T.nonzero().flatten().tolist() == [10]  # the changed byte itself sees the change, nothing after it
    early = logits(b"X123456789", b"a" * 35, b"0123456789", b"")
    assert (a[0] != early[0]).any(dim=1).nonzero().flatten().tolist() == list(range(1, 11))
    # The same document gives the same logits wherever it lies: positions and mass restart with it.
    torch.testing.assert_close(a[0][47:58], a[0][0:11], rtol=1e-5, atol=1e-5)


def test_packing_by_hand() -> None:
    # Documents sep a b, sep c d e f g, sep h i in rows of 5; the last is not whole and is left out.
    rows_RL = lm_text.cut_rows([b"ab", b"cdefg", b"hi"], 5)
    sep, text = lm_text.SEPARATOR, {letter: ord(letter) for letter in "abcdefghi"}
    a, b, c, d, e, f, g, h, _ = text.values()
    assert rows_RL.tolist() == [[sep, a, b, sep, c, d], [d, e, f, g, sep, h]]
    batch = lm_text.pack(rows_RL, CPU)
    assert batch.tokens_T.tolist() == [sep, a, b, sep, c, d, e, f, g, sep]
    assert batch.targets_T.tolist() == [a, b, sep, c, d, e, f, g, sep, h]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 9, 10]
    assert batch.cu_seqlens.dtype == torch.int32


def test_the_separator_is_never_a_target_of_the_loss() -> None:
    model = Decoder(SMALL, stablemask(math.inf, length=4))
    torch.nn.init.normal_(model.head.weight)
    batch = lm_text.pack(lm_text.cut_rows([b"ab", b"c", b"de"], 4), CPU)
    by_hand = -model(batch).log_softmax(dim=1)[[0, 1, 3], [ord("a"), ord("b"), ord("c")]].mean()
    torch.testing.assert_close(model.loss(batch), by_hand)


def test_batches_take_every_row_once_before_any_again() -> None:
    rows_RL = torch.arange(7)[:, None]
    source = lm_text.batches(rows_RL, 3, seed=1)
    epochs = [sorted([*next(source).flatten().tolist(), *next(source).flatten().tolist()]) for _ in range(5)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_training_and_validation_share_no_document(folder: Path) -> None:
    text = lm_text.read_text(folder)
    assert set(text.training).isdisjoint(text.validation)
    whole = sorted(f.read_bytes() for f in folder.rglob("*.txt") if f.name != "again.txt")
    assert sorted(text.training + text.validation) == whole  # each once, the duplicate and the picture left out
    (folder / "0.txt").rename(folder / "elsewhere.txt")
    assert lm_text.read_text(folder) == text  # names and places do not matter


def test_one_file_is_split_by_length(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_bytes(bytes(range(97, 117)))
    assert lm_text.read_text(file)[:2] == ([bytes(range(97, 115))], [bytes(range(115, 117))])


def test_the_default_text_is_the_standard_library() -> None:
    text = lm_text.read_text(None)
    assert len(text.training) > 100
    assert set(text.training).isdisjoint(text.validation)
    assert any(b"class JSONDecoder" in document for document in text.training + text.validation)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--text", "nowhere"], "no such file or folder"),
        (["--text", "empty"], "nothing to read"),
        (["--text", "binary.txt"], "nothing to read"),
        (["--text", "short.txt"], "too short"),
        (["--gamma", "-1"], "--gamma must be headwise or a number >= 0, got -1"),
        (["--gamma", "nan"], "got nan"),
        (["--gamma", "steep"], "got steep"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--steps", "many"], "invalid int value"),
        (["--seed", "-1"], "--seed must be in"),
        (["--out", "short.txt"], "not a folder"),
        (["--layers", "2"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    options: list[str],
    why: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff" * 5000)
    (tmp_path / "short.txt").write_text("too short")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        lm.main(["--text", str(folder), "--out", "out", "--steps", "1", *options], SMALL)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert why in printed.err
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "short.txt").read_text() == "too short"
