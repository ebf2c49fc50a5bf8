"""Shared by the tests of benchmarks.lm: a folder of short documents, and a size to match."""

import random
from pathlib import Path

import torch

from benchmarks.lm.presets import Size
from benchmarks.lm.text import read_text
from benchmarks.lm.tokens import Corpus, tokenise
from benchmarks.lm.train import TrainingRun
from benchmarks.lm.variants import named

SMALL = Size(
    layers=2, width=24, heads=3, hidden=48, vocab=300, length=13, rows=5, at_once=5, steps=20, warmup=3, peak_lr=1e-2,
    last_lr=1e-3, validation_rows=7, validations=3, long_texts=3,
)  # fmt: skip
CPU = torch.device("cpu")


def write_folder(folder: Path) -> Path:
    """23 different documents of a few hundred words, one of them twice, and one file that is no text."""
    (folder / "deeper").mkdir(parents=True)
    draw = random.Random(0)
    words = ["one", "two", "three", "window", "door", "house", "über", "attention,", "sink.\n"]
    for i in range(23):
        text = f"document {i}\n" + " ".join(draw.choices(words, k=300 + 10 * (i % 5)))
        (folder / ("deeper" if i % 2 else ".") / f"{i}.txt").write_text(text, encoding="utf-8")
    (folder / "again.txt").write_bytes((folder / "0.txt").read_bytes())
    (folder / "picture.bin").write_bytes(b"\xff\xfe\x00\x81" * 100)
    return folder


def corpus_of(folder: Path, vocab: int = SMALL.vocab) -> Corpus:
    return tokenise(read_text(folder), vocab)


def run_of(corpus: Corpus, name: str, where: Path, size: Size = SMALL, position: str = "rope", seed: int = 0) -> TrainingRun:
    return TrainingRun(named(name), seed, size, position, corpus, where, CPU)
