"""What benchmarks.lm reads: documents, rows, packed batches, tokens and datasets, each against it by hand."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.lm import tokens
from benchmarks.lm.text import SEPARATOR, batches, cut_rows, pack, read_text
from benchmarks.lm.tokens import DATASETS, Corpus, read_dataset, tokenise
from tests.helpers.lm import CPU, SMALL, corpus_of


def test_packing_by_hand() -> None:
    # Documents sep a b, sep c d e f g, sep h i in rows of 5; the last is not whole and is left out.
    rows_RL = cut_rows([b"ab", b"cdefg", b"hi"], 5)
    sep, text = SEPARATOR, {letter: ord(letter) for letter in "abcdefghi"}
    a, b, c, d, e, f, g, h, _ = text.values()
    assert rows_RL.tolist() == [[sep, a, b, sep, c, d], [d, e, f, g, sep, h]]
    batch = pack(rows_RL, CPU)
    assert batch.tokens_T.tolist() == [sep, a, b, sep, c, d, e, f, g, sep]
    assert batch.targets_T.tolist() == [a, b, -100, c, d, e, f, g, -100, h]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 9, 10]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.rows == 2


def test_an_artificial_token_is_before_each_row_and_predicts_nothing() -> None:
    rows_RL = torch.tensor([[9, 1, 2, 9, 3], [4, 5, 9, 6, 7]])
    batch = pack(rows_RL, CPU, separator=9, lead=10)
    assert batch.tokens_T.tolist() == [10, 9, 1, 2, 9, 10, 4, 5, 9, 6]
    assert batch.targets_T.tolist() == [-100, 1, 2, -100, 3, -100, 5, -100, 6, 7]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 8, 10]
    plain = pack(rows_RL, CPU, separator=9)
    assert plain.targets_T[plain.targets_T != -100].tolist() == batch.targets_T[batch.targets_T != -100].tolist()


def test_batches_take_every_row_once_before_any_again() -> None:
    rows_RL = torch.arange(7)[:, None]
    source = batches(rows_RL, 3, seed=1)
    epochs = [sorted([*next(source).flatten().tolist(), *next(source).flatten().tolist()]) for _ in range(5)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_training_and_validation_share_no_document(folder: Path) -> None:
    text = read_text(folder)
    assert set(text.training).isdisjoint(text.validation)
    whole = sorted(f.read_bytes() for f in folder.rglob("*.txt") if f.name != "again.txt")
    assert sorted(text.training + text.validation) == whole  # each once, the duplicate and the picture left out
    (folder / "0.txt").rename(folder / "elsewhere.txt")
    assert read_text(folder) == text  # names and places do not matter


def test_one_file_is_split_by_length(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_bytes(bytes(range(97, 117)))
    assert read_text(file)[:2] == ([bytes(range(97, 115))], [bytes(range(115, 117))])


def test_the_default_text_is_the_standard_library() -> None:
    text = read_text(None)
    assert len(text.training) > 100
    assert set(text.training).isdisjoint(text.validation)
    assert any(b"class JSONDecoder" in document for document in text.training + text.validation)


def documents_of(line: Tensor, corpus: Corpus) -> list[list[int]]:
    documents: list[list[int]] = []
    for token in line.tolist():
        if token == corpus.separator:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents


def test_tokens_are_the_documents_and_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "CACHE", folder.parent / "cache")
    text, corpus = read_text(folder), corpus_of(folder)
    (kept,) = tokens.CACHE.glob("*.json")
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel

    tokenizer = Tokenizer.from_file(str(kept))
    tokenizer.decoder = ByteLevel()  # pyright: ignore
    for line, documents in ((corpus.training, text.training), (corpus.validation, text.validation)):
        found = documents_of(line, corpus)
        assert [tokenizer.decode(tokens).encode() for tokens in found] == documents
        assert [int(corpus.bytes_of[tokens].sum()) for tokens in found] == [len(document) for document in documents]
    assert corpus.bytes_of[corpus.separator] == corpus.bytes_of[corpus.artificial] == 0
    assert corpus.bytes_of.max() > 3  # it did learn words
    monkeypatch.setattr(tokens, "BpeTrainer", None)
    monkeypatch.setattr(tokens, "_line", None)
    again = corpus_of(folder)
    assert torch.equal(again.training, corpus.training)
    assert corpus_of(folder).fingerprint == corpus.fingerprint


def test_the_tokenizer_never_sees_the_validation_text(folder: Path) -> None:
    corpus, text = corpus_of(folder), read_text(folder)
    other = tokenise(text._replace(validation=[b"entirely other words, over and over " * 50]), SMALL.vocab)
    assert torch.equal(other.training, corpus.training)
    assert other.fingerprint != corpus.fingerprint


def test_long_texts_are_within_one_document(folder: Path) -> None:
    corpus = corpus_of(folder)
    rows = corpus.long_texts(50, 7)
    assert rows.shape == (7, 51)
    assert not (rows == corpus.separator).any()
    whole = [bytes(str(d), "ascii").strip(b"[]") for d in documents_of(corpus.validation, corpus)]
    assert all(any(bytes(str(row), "ascii").strip(b"[]") in document for document in whole) for row in rows.tolist())
    assert len(corpus.long_texts(10**6, 7)) == 0


@pytest.mark.parametrize("name", ["wikitext-103", "minipile"])
def test_a_dataset_in_the_format_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    home = tmp_path / "dataset"
    home.mkdir()
    lines = {
        "train": ["", " = One = \n", "", " First line . \n", " = = Section = = \n", " Second . \n", " = Two = \n", " Third . \n"],
        "validation": [" = Three = \n", " Fourth . \n"],
    }
    for part, text in lines.items():
        datasets.Dataset.from_dict({"text": text}).to_parquet(str(home / f"{part}-00000-of-00001.parquet"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setitem(DATASETS, name, (str(home), None))
    text = read_dataset(name)
    if name == "minipile":  # a document per row
        assert text.training == [line.encode() for line in lines["train"] if line]
    else:  # a line per row, an article from title to title
        one = " = One = \n\n First line . \n = = Section = = \n Second . \n"
        assert text.training == [one.encode(), b" = Two = \n Third . \n"]
        assert text.validation == [b" = Three = \n Fourth . \n"]


def test_a_dataset_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setitem(DATASETS, "minipile", (str(tmp_path / "nothing"), None))
    with pytest.raises(ValueError, match="--dataset: minipile could not be loaded from"):
        read_dataset("minipile")
