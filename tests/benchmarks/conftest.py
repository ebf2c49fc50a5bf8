from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.lm import tokens
from tests.helpers.cure import WORDS, tiny, write_model
from tests.helpers.lm import CPU, write_folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of tokenizers and tokens, which go by the content of a text: shared by all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _on_one_core(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[None]:
    """Tensors this small gain nothing from a second core, and lose much where that core is busy."""
    monkeypatch.setattr(report, "pick_device", lambda: CPU)
    monkeypatch.setattr(tokens, "CACHE", cache)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "text")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of benchmarks.cure's tests, model and tokenizer."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return tiny(tiny_llama)


@pytest.fixture
def rows_RL() -> torch.Tensor:
    return torch.randint(len(WORDS), (5, 33), generator=torch.Generator().manual_seed(3))
