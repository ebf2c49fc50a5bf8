"""The packages of pyproject.toml's test extra at one end of the ranges that users may install, as requirements for pip.

    python .ci/versions.py oldest | pip install --editable . -r /dev/stdin

oldest: the lower end of each range. newest: each range, and no pin. A tool without a range keeps its pin, or has none.
"""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OF_USERS = ("bench", "torchtitan", "transformers", "testing")


def split(requirement: str) -> tuple[str, str]:
    """("numpy", ">=2.0")"""
    match = re.fullmatch(r"([\w.-]+)(.*)", requirement)
    assert match is not None, requirement
    return match[1], match[2]


def ranges() -> dict[str, str]:
    """What users may install, by package: of an extra's range and the library's own, the library's."""
    found = [*(requirement for extra in OF_USERS for requirement in EXTRAS[extra]), *PROJECT["dependencies"]]
    return dict(split(requirement) for requirement in found if not requirement.startswith("sm-flex["))


def pins() -> dict[str, str]:
    return dict(split(requirement) for requirement in EXTRAS["test"] if not requirement.startswith("sm-flex["))


def oldest() -> dict[str, str]:
    lowest = {package: re.match(r">=([\d.]+)", accepted) for package, accepted in ranges().items()}
    return {**pins(), **{package: f"=={match[1]}" for package, match in lowest.items() if match is not None}}


def newest() -> dict[str, str]:
    return {**dict.fromkeys(pins(), ""), **ranges()}


if __name__ == "__main__":
    print("\n".join(package + accepted for package, accepted in {"oldest": oldest, "newest": newest}[sys.argv[1]]().items()))
