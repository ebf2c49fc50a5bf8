"""README, docs and examples are true: code runs, links lead somewhere, figures are those of the result files."""

import doctest
import inspect
import json
import re
import runpy
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch

import sm_flex
import sm_flex.testing
from sm_flex import diagnostics, flash_attn

ROOT = Path(__file__).parents[1]
DOCS, README = ROOT / "docs", ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", *(ROOT / folder / "README.md" for folder in ("integrations", "benchmarks"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOK = ROOT / "examples" / "stablemask_tour.ipynb"

LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Each ```python block, with the number of its first line."""
    text = page.read_text()
    return [(text[: m.start(1)].count("\n"), m[1]) for m in re.finditer(r"^```python\n(.*?)^```$", text, re.S | re.M)]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name_of)
def test_python_blocks_run_in_order(page: Path) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for line, code in python_blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), names)  # so that a traceback names the line of the page


def test_the_example_of_the_readme_is_ten_lines() -> None:
    (_, code), *others = python_blocks(README)
    assert not others
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["out"].shape == (2, 8, 128, 64)
    assert names["q"].grad.abs().sum() > 0


def test_the_readme_is_one_page() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 110
    for extra, command in (("bench", "python -m benchmarks.lm"), ("test", "pytest")):
        assert f"    python3 -m venv .venv && .venv/bin/pip install -e '.[{extra}]' && .venv/bin/{command}" in lines


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_commands_exist(page: Path) -> None:
    """Every module of ours that a command runs is one that can be run, and every script a file."""
    text = page.read_text()
    for module in re.findall(r"-m ((?:sm_flex|benchmarks)[\w.]*\w)", text):
        path = module.replace(".", "/")
        files = [folder / f"{path}{end}" for folder in (ROOT, ROOT / "integrations") for end in (".py", "/__main__.py")]
        assert any(file.is_file() for file in files), module
    for script in re.findall(r"python (examples/\S+|docs/\S+)", text):
        assert (ROOT / script).is_file(), script


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as Markdown's toc extension makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
    for target in LINK.findall(text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in slugs(file), target


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert f"{page.relative_to(DOCS).as_posix()}\n" in navigation, page


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+\.\d+", text)


@pytest.mark.parametrize("page", [README, DOCS / "results.md"], ids=name_of)
def test_figures_are_those_of_the_result_files(page: Path) -> None:
    """Each number of a table is, rounded, one of a result file that its section links."""
    checked = 0
    for section in re.split(r"^#+ ", page.read_text(), flags=re.M):
        linked = re.findall(r"\(((?:\.\./)?benchmarks/results/[^)]+\.md)\)", section)
        known = [float(x) for file in linked for x in numbers((page.parent / file).read_text())]
        for row in re.findall(r"^\|.*\|$", section, re.M) if linked else ():
            for cell in row.strip("|").split("|")[1:]:
                for x in numbers(cell):
                    half = 0.5 * 10.0 ** -len(x.partition(".")[2])
                    assert any(abs(y - float(x)) <= half * 1.001 for y in known), f"{x} of {row} is not in {linked}"
                    checked += 1
    assert checked >= (10 if page == README else 100)


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_examples_run(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(example.read_text().splitlines()) <= 60
    assert f'--8<-- "{name_of(example)}"' in (DOCS / "examples.md").read_text()
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_the_notebook_runs_and_prints_what_it_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    drawn: list[Any] = []
    monkeypatch.setattr(pyplot, "show", lambda: drawn.append(pyplot.gcf()))
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len([line for cell in cells for line in cell["source"] if line.strip()]) <= 30
    names: dict[str, Any] = {}
    for cell in cells:
        figures, text = len(drawn), ""
        exec("".join(cell["source"]), names)
        for output in cell["outputs"]:
            text += "".join(output.get("text", []))
            figures += "image/png" in output.get("data", {})
        assert len(drawn) == figures
        printed = [float(x) for x in numbers(capsys.readouterr().out)]
        assert printed == pytest.approx([float(x) for x in numbers(text)], abs=2e-3)
    assert len(drawn) >= 2
    pyplot.close("all")


def public_names() -> dict[str, Any]:
    found = {f"sm_flex.{name}": getattr(sm_flex, name) for name in sm_flex.__all__}
    found |= {f"sm_flex.testing.{name}": getattr(sm_flex.testing, name) for name in sm_flex.testing.__all__}
    found |= {f"sm_flex.flash_attn.{name}": getattr(flash_attn, name) for name in flash_attn.__all__}
    for name, function in inspect.getmembers(diagnostics, inspect.isfunction):
        if name in diagnostics.__all__:
            found[f"sm_flex.diagnostics.{name}"] = function
    return found


def test_every_public_name_is_in_the_api_page() -> None:
    page = (DOCS / "api.md").read_text()
    assert [name for name in public_names() if not re.search(rf"\b{re.escape(name)}\b", page)] == []


def test_docstring_examples() -> None:
    torch.manual_seed(0)
    names = {name.rpartition(".")[2]: x for name, x in public_names().items()} | {"torch": torch, "sm_flex": sm_flex}
    ran = 0
    for name, x in public_names().items():
        for test in doctest.DocTestFinder(recurse=inspect.isclass(x)).find(x, name, module=False, globs=dict(names)):
            result = doctest.DocTestRunner().run(test)
            assert result.failed == 0, name
            ran += result.attempted
    assert ran >= 10
