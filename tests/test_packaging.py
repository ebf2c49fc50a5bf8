"""pyproject.toml's promises to users and to CI agree."""

import importlib.util
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]


def versions():
    spec = importlib.util.spec_from_file_location("versions", ROOT / ".ci" / "versions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ci_installs_one_version_of_everything_that_users_may_choose() -> None:
    """The pin is within the range, and so is the oldest version that CI tests; of torch alone there is only an upper end."""
    pins, oldest = versions().pins(), versions().oldest()
    assert {name for name, pin in pins.items() if not pin.startswith("==")} == {"torch"}
    for name, accepted in versions().ranges().items():
        assert SpecifierSet(accepted).contains(pins[name].lstrip("=<")), name
        assert SpecifierSet(accepted).contains(oldest[name].lstrip("=")), name
