"""The text that a model is looked at on, in rows of tokens.

alice.txt: Lewis Carroll, Alice's Adventures in Wonderland (1865), chapters I to IV, the Millennium Fulcrum Edition 2.9, one
paragraph a line. Public domain. From alice29.txt of the Canterbury corpus, as it stands in the sources of Brotli (PyPI, brotli
1.2.1).
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sm_flex.diagnostics import token_kinds
from sm_flex_transformers.look.errors import BadInput

BUNDLED = "Alice's Adventures in Wonderland, chapters I to IV"
LENGTH, ROWS = 512, 6  # where the user does not say


class Rows(NamedTuple):
    """ids: (N, S + 1), the last column being targets alone. kinds: (N, S), of the S tokens that are read."""

    ids: Tensor
    kinds: Tensor


def bundled() -> str:
    return (files("sm_flex_transformers.look") / "alice.txt").read_text(encoding="utf-8")


def read(path: Path) -> str:
    """A text file.

    Raises:
        BadInput: it is not there, or no text.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadInput(f"--text {path} cannot be read: {error.strerror}") from error
    if b"\0" in raw:
        raise BadInput(f"--text {path} is binary: it must be text in UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"--text {path} is no text in UTF-8 (byte {error.start}): convert it, or give another") from error


def rows_of(tokenizer: Any, text: str, config: Any, length: int | None, count: int, window: int) -> Rows:
    """Rows of a text, evenly spread over it, each begun as the tokenizer begins a text.

    Raises:
        BadInput: the text has too few tokens, or the model too few positions, for a row that is longer than the window.
    """
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < 2:
        raise BadInput(
            f"the text has {len(ids)} token{'' if len(ids) == 1 else 's'}: it must be longer than the window, {window}"
        )
    start = _start(tokenizer)
    longest = len(start) + len(ids) - 1
    if longest <= window:
        raise BadInput(
            f"the text has {len(ids)} tokens: it must be longer than the window, {window}, for the first token to leave it; give "
            "a longer text or a smaller --window"
        )
    positions = getattr(config, "max_position_embeddings", None) or longest
    if length is None:
        length = min(LENGTH, longest, positions)
    if length > longest:
        raise BadInput(f"--length {length} is longer than the text, which has {longest + 1} tokens")
    if length > positions:
        raise BadInput(f"--length {length} is longer than the {positions} positions of the model (max_position_embeddings)")
    if length <= window:
        raise BadInput(f"a row of {length} tokens must be longer than the window, {window}: give a smaller --window")
    step = length - len(start)
    pieces = torch.tensor(ids).unfold(0, step + 1, step)
    if count < len(pieces):
        pieces = pieces[torch.linspace(0, len(pieces) - 1, count).long()]
    found = torch.cat([torch.tensor(start, dtype=torch.long).expand(len(pieces), -1), pieces], 1)
    return Rows(found, torch.stack([token_kinds(_texts(tokenizer, row[:-1].tolist())) for row in found]))


def _start(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: a BOS token, or nothing."""
    bare, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    where = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:where]


def _texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    return [tokenizer.decode([token]) for token in ids]
