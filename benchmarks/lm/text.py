"""Text to train on: files become documents, documents become rows, rows become packed batches.

Each document is a separator and then its bytes (or the tokens of tokens.py); documents are laid one after
another, and the line is cut into rows of N tokens, N being the training length that StableMask asks for:

    row 0       <sep> i m p o r t     the first N = 7 tokens of a document
    row 1       _ o s <sep> d e f     its last three bytes, and the next document
    positions   0 1 2 0     1 2 3     of row 1: they restart with each document and with each row

A batch is a few rows, flattened. A document longer than a row continues in the next one as a document of its
own.

Shapes in names: R rows, L = N + 1 tokens of a row with the target of its last; T packed tokens of a batch.
"""

import hashlib
import math
import platform
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BYTES, SEPARATOR = 256, 256  # of text that is read byte by byte
IGNORED = -100  # cross_entropy's own
# Not text that anybody wrote by hand, or not part of every installation.
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "__pycache__"}
VALIDATION_PART = 10  # one file in ten


class Text(NamedTuple):
    """Documents of the training and of the validation, none in both."""

    training: list[bytes]
    validation: list[bytes]
    name: str


def read_text(path: Path | None) -> Text:
    """The files under path (Python's standard library if None), each distinct one once, split by file.

    Files are in the order of their SHA-256, which is as good as random and the same on every machine; the
    first tenth is for validation. A single file is split at nine tenths of its length. Files that are hidden
    (.git) or not UTF-8 are skipped.
    """
    root = Path(sysconfig.get_path("stdlib")) if path is None else path
    if not root.exists():
        raise ValueError(f"--text: no such file or folder: {root}")
    documents = {}
    for file in [root] if root.is_file() else sorted(root.rglob("*")):
        parts = file.relative_to(root).parts
        skipped = any(part.startswith(".") for part in parts)
        if path is None:
            skipped = skipped or file.suffix != ".py" or not NOT_LIBRARY.isdisjoint(parts)
        if file.is_file() and not skipped and (content := file.read_bytes()):
            with suppress(UnicodeDecodeError):
                content.decode()
                documents[hashlib.sha256(content).hexdigest()] = content
    if not documents:
        raise ValueError(f"--text: nothing to read in {root}: give a file of UTF-8 text, or a folder of them")
    ordered = [documents[digest] for digest in sorted(documents)]
    name = f"Python {platform.python_version()} standard library" if path is None else root.name
    if len(ordered) == 1:
        cut = len(ordered[0]) * (VALIDATION_PART - 1) // VALIDATION_PART
        return Text([ordered[0][:cut]], [ordered[0][cut:]], name)
    cut = math.ceil(len(ordered) / VALIDATION_PART)
    return Text(ordered[cut:], ordered[:cut], name)


def cut_rows(documents: list[bytes], length: int) -> Tensor:
    """(R, N + 1) int16: rows of N bytes of the documents in line, each with the byte that follows it."""
    # A separator has no byte of its own: hold a place for it, and name it once bytes have become integers.
    line = b"".join(b"\0" + document for document in documents)
    lengths = torch.tensor([1 + len(document) for document in documents])
    tokens = torch.frombuffer(bytearray(line), dtype=torch.uint8).to(torch.int16)
    tokens[lengths.cumsum(0) - lengths] = SEPARATOR
    return rows_of(tokens, length)


def rows_of(line: Tensor, length: int) -> Tensor:
    """(R, N + 1): rows of N tokens of a line, each with the token that follows it; a view."""
    return line.unfold(0, length + 1, length) if len(line) > length else line.new_empty(0, length + 1)


def evenly(rows: Tensor, most: int) -> Tensor:
    """Of the rows at most so many, evenly spread over them."""
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).long()] if len(rows) else rows


class Packed(NamedTuple):
    tokens_T: Tensor
    targets_T: Tensor  # IGNORED where there is nothing to predict
    positions_T: Tensor  # in its own document
    cu_seqlens: Tensor  # (documents + 1,) the first token of each document, and T
    rows: int  # of T / rows tokens each


def pack(rows_RL: Tensor, device: torch.device, separator: int = SEPARATOR, lead: int | None = None) -> Packed:
    """Rows flattened into one batch. A document starts at each separator and at each row.

    lead: a token that is put before each row, in the document that the row begins with; it predicts nothing.
    """
    rows_RL = rows_RL.to(device, torch.int64)
    starts_RT = rows_RL[:, :-1] == separator
    targets_RT = rows_RL[:, 1:].masked_fill(rows_RL[:, 1:] == separator, IGNORED)
    if lead is not None:
        starts_RT[:, 0] = False
        rows_RL, starts_RT = F.pad(rows_RL, (1, 0), value=lead), F.pad(starts_RT, (1, 0))
        targets_RT = F.pad(targets_RT, (1, 0), value=IGNORED)
    starts_RT[:, 0] = True
    tokens_T, starts_T = rows_RL[:, :-1].flatten(), starts_RT.flatten()
    index_T = torch.arange(len(tokens_T), device=device)
    positions_T = index_T - torch.where(starts_T, index_T, 0).cummax(0).values
    cu_seqlens = torch.cat([index_T[starts_T], index_T.new_tensor([len(tokens_T)])]).to(torch.int32)
    return Packed(tokens_T, targets_RT.flatten(), positions_T, cu_seqlens, len(rows_RL))


def batches(rows_RL: Tensor, per_batch: int, seed: int) -> Iterator[Tensor]:
    """Rows in random order, every row once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows_RL), generator=generator)
        yield from (rows_RL[part] for part in order.split(per_batch) if len(part) == per_batch)
