"""What the tests of vLLM share: one small model, and what Transformers makes of it."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.helpers import vllm_engines as engines

    return engines.save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def reference(llama: Path) -> Any:
    from tests.helpers import vllm_engines as engines

    return engines.transformers_model(llama)
