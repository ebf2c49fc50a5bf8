"""Documents as tokens of a byte-level BPE, trained once on the training text; both are kept on disk.

Also the text of Hugging Face datasets (wikitext-103, minipile) as documents.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from benchmarks import report
from benchmarks.lm.text import Text, evenly, rows_of

CACHE = report.OUT / "cache"
AT_A_TIME = 1000  # documents

# name: (path on the Hugging Face hub, configuration)
DATASETS: dict[str, tuple[str, str | None]] = {
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "minipile": ("JeanKaddour/minipile", None),
}


@dataclass(frozen=True)
class Corpus:
    """Tokens below vocab, and two that are no text: the separator of documents, and the artificial token."""

    name: str
    vocab: int
    training: Tensor  # int32, documents one after another, each after a separator
    validation: Tensor
    bytes_of: Tensor  # (vocab + 2,) how many bytes of text each token is
    documents: tuple[int, int]
    text_bytes: tuple[int, int]
    fingerprint: str

    @property
    def separator(self) -> int:
        return self.vocab

    @property
    def artificial(self) -> int:
        return self.vocab + 1

    def long_texts(self, tokens: int, most: int) -> Tensor:
        """(n, tokens + 1), n <= most: parts of single validation documents, evenly chosen."""
        starts = (self.validation == self.separator).nonzero().flatten()
        documents = self.validation.tensor_split(starts)[1:]
        return evenly(torch.cat([rows_of(document[1:], tokens) for document in documents]), most)


def tokenise(text: Text, vocab: int) -> Corpus:
    """text as tokens of a byte-level BPE of vocab tokens, from CACHE where they are there."""
    digest = hashlib.sha256(f"{tokenizers.__version__} {vocab}".encode())
    for part in (text.training, text.validation):
        for document in part:
            digest.update(hashlib.sha256(document).digest())
        digest.update(b"|")
    fingerprint = digest.hexdigest()[:16]
    tokenizer = _tokenizer(text, vocab, fingerprint)
    cached = CACHE / f"{fingerprint}.pt"
    if not cached.exists():
        parts = [_line(tokenizer, part, vocab) for part in (text.training, text.validation)]
        replace_whole(cached, lambda path: torch.save(parts, path))
    training, validation = torch.load(cached, weights_only=True)
    bytes_of = torch.zeros(vocab + 2, dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        bytes_of[index] = len(token)  # byte-level: one character of a token's name stands for one byte
    assert tokenizer.get_vocab_size() <= vocab
    documents = len(text.training), len(text.validation)
    text_bytes = sum(map(len, text.training)), sum(map(len, text.validation))
    return Corpus(text.name, vocab, training, validation, bytes_of, documents, text_bytes, fingerprint)


def _tokenizer(text: Text, vocab: int, fingerprint: str) -> tokenizers.Tokenizer:
    path = CACHE / f"{fingerprint}.json"
    if path.exists():
        return tokenizers.Tokenizer.from_file(str(path))
    tokenizer = tokenizers.Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    trainer = BpeTrainer(vocab_size=vocab, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator((document.decode() for document in text.training), trainer)
    replace_whole(path, lambda new: tokenizer.save(str(new)))
    return tokenizer


def _line(tokenizer: tokenizers.Tokenizer, documents: list[bytes], separator: int) -> Tensor:
    encoded = []
    for first in range(0, len(documents), AT_A_TIME):
        encoded += tokenizer.encode_batch([document.decode() for document in documents[first : first + AT_A_TIME]])
    return torch.cat([torch.tensor([separator, *encoding.ids], dtype=torch.int32) for encoding in encoded])


def replace_whole(path: Path, write) -> None:
    """path written by write(), at once: a run that is killed leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    write(new)
    new.replace(path)


def read_dataset(name: str) -> Text:
    """A dataset of the Hugging Face hub as documents."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError("--dataset: Hugging Face's datasets are not installed: pip install datasets") from None
    path, configuration = DATASETS[name]
    try:
        parts = load_dataset(path, configuration)
    except (OSError, ValueError) as error:  # no network, no such file
        raise ValueError(f"--dataset: {name} could not be loaded from {path}: {error}") from None
    join = _articles if name == "wikitext-103" else list
    training, validation = ([x.encode() for x in join(parts[part]["text"]) if x.strip()] for part in ("train", "validation"))
    if not training or not validation:
        raise ValueError(f"--dataset: {name} has nothing to read in its train or its validation part")
    return Text(training, validation, name)


def _articles(lines: Iterable[str]) -> list[str]:
    """wikitext's lines joined into articles, each of which begins with a line " = Title = "."""
    articles: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r" = [^=].* = \n?", line):
            articles.append([])
        articles[-1].append(line if line.endswith("\n") else line + "\n")
    return ["".join(article) for article in articles]
