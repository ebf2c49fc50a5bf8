import json
from pathlib import Path

import pytest

from tests.helpers import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes, and the README's lines as documents, a few of them in each row of 256 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("titan")
    (folder / "tok").mkdir()
    (folder / "text").mkdir()
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(letters[-2:])
    tokenizer.save(str(folder / "tok" / "tokenizer.json"))
    (folder / "tok" / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if len(line) > 40]
    (folder / "text" / "train.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return folder
