"""Text as rows of single documents, in the tokens of the model's own tokenizer. Nothing is put before a row."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lm import tokens
from benchmarks.lm.text import Text, evenly, rows_of


@dataclass(frozen=True)
class Corpus:
    name: str
    training: list[Tensor]  # int32, by document
    validation: list[Tensor]
    fingerprint: str

    def training_rows(self, length: int, order: int) -> Tensor:
        """(R, length + 1), every row of the training documents, in one of the random orders."""
        rows_RL = _rows(self.training, length)
        return rows_RL[torch.randperm(len(rows_RL), generator=torch.Generator().manual_seed(order))]

    def held_out_rows(self, length: int, most: int) -> Tensor:
        """(R, length + 1), R <= most, evenly spread over the held-out documents."""
        return evenly(_rows(self.validation, length), most)


def _rows(documents: list[Tensor], length: int) -> Tensor:
    return torch.cat([rows_of(document, length) for document in documents]).long()


def tokenise(text: Text, folder: Path, tokenizer: Any) -> Corpus:
    """text in the tokens of a model's folder, from the cache of benchmarks.lm where they are there."""
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes() if (folder / "tokenizer.json").exists() else b"")
    for part in (text.training, text.validation):
        for document in part:
            digest.update(hashlib.sha256(document).digest())
        digest.update(b"|")
    fingerprint = digest.hexdigest()[:16]
    cached = tokens.CACHE / f"cure-{fingerprint}.pt"
    if not cached.exists():
        parts = [[_encoded(tokenizer, x) for x in part] for part in (text.training, text.validation)]
        tokens.replace_whole(cached, lambda path: torch.save(parts, path))
    training, validation = torch.load(cached, weights_only=True)
    return Corpus(text.name, training, validation, fingerprint)


def _encoded(tokenizer: Any, document: bytes) -> Tensor:
    ids = tokenizer(document.decode(), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int32)
