"""The README is true: its example runs, its tree is the tree, its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_examples(capsys: pytest.CaptureFixture[str]):
    use, transformers, check = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in use.splitlines() if line.strip()]) <= 10
    names: dict = {}
    exec(use, names)
    assert names["out"].shape == (2, 8, 128, 64)
    assert names["q"].grad.abs().sum() > 0
    exec(transformers, {})
    exec(check, names)
    assert "14 laws passed, 0 failed, 5 not run" in capsys.readouterr().out


def test_tree():
    """Every module of the package is named, and every name in the tree exists."""
    tree = re.search(r"## The tree\n\n```\n(.*?)```", README, re.S)
    assert tree is not None
    for path in (ROOT / "sm_flex").rglob("*.py"):
        if path.stem not in ("__init__", "_version"):
            assert re.search(rf"\b{path.stem}\b", tree[1]) or path.parent.name == "testing", path
    folders: list[str] = []
    for line in tree[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        assert (ROOT / "".join(folders)).exists(), folders


def test_links():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_docstring_examples():
    import doctest

    import torch

    import sm_flex
    from sm_flex import diagnostics, score_mod
    from sm_flex.dropins import flex, sdpa, varlen
    from sm_flex.epilogue import remask
    from sm_flex.mass import closed_form, gamma

    torch.manual_seed(0)
    names = {name: getattr(sm_flex, name) for name in sm_flex.__all__} | {"torch": torch}
    ran = 0
    for module in (diagnostics, gamma, closed_form, score_mod, remask, flex, sdpa, varlen):
        for test in doctest.DocTestFinder().find(module, extraglobs=names):
            result = doctest.DocTestRunner().run(test)
            assert result.failed == 0
            ran += result.attempted
    assert ran >= 24
