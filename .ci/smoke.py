"""Builds sdist and wheel, and tries the wheel in an environment that has nothing else of ours.

    .venv/bin/python .ci/smoke.py [--dist DIR]

The Python that runs this has build and torch. The clean environment borrows the site-packages that hold torch, so that it is
not installed twice. An editable install in them does not count there: its .pth file is not read. --dist keeps what was built.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["sm_flex", *sorted(path.parent.name for path in (ROOT / "integrations").glob("*/__init__.py"))]
IN_SDIST = ["LICENSE", "README.md", "pyproject.toml", "sm_flex/py.typed"]
# Runs in the clean environment: the wheel is what is imported, it is StableMask, and it holds every package.
TRY = """
import importlib, importlib.metadata, sys
import torch
import sm_flex
from sm_flex.testing import oracle

assert sm_flex.__file__.startswith(sys.prefix), sm_flex.__file__
q, k, v = (torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
gamma = sm_flex.headwise_gamma(4)
out = sm_flex.flex_attention(q, k, v, score_mod=sm_flex.stablemask(gamma, length=16))
expected = oracle(q, k, v, gamma=gamma, length=16)[0]
torch.testing.assert_close(out, expected)
ours, theirs = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (out, expected))
torch.testing.assert_close(ours, theirs)

files = importlib.metadata.files("sm-flex")
found = {str(path.parent) for path in files if path.name == "__init__.py" and len(path.parts) == 2}
assert found == set(sys.argv[1:]), found
assert any(path.name == "LICENSE" for path in files) and any(path.name == "py.typed" for path in files)
for name in sorted(found):
    assert importlib.import_module(name).__file__.startswith(sys.prefix), name
print(f"imported {', '.join(sorted(found))}")
"""


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=cwd, env=environment, check=True)


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = [name for name in IN_SDIST if name not in names]
    if missing:
        raise SystemExit(f"{path.name} lacks {', '.join(missing)}")


def clean_environment(folder: Path, wheel: Path) -> Path:
    """Its Python."""
    venv.create(folder, with_pip=False)
    site = folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel)
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise SystemExit(f"{sys.executable} has no torch")
    (site / "borrowed.pth").write_text(str(Path(torch.origin).parents[1]))
    return folder / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds sdist and wheel, and tries the wheel in a clean environment.")
    parser.add_argument("--dist", type=Path, help="an empty folder for what is built (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dist = args.dist.absolute() if args.dist else folder / "dist"
        run(sys.executable, "-m", "build", "--quiet", "--outdir", dist)
        (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
        check_sdist(sdist)
        python = clean_environment(folder / "venv", wheel)
        run(python, "-W", "error", "-c", TRY, *PACKAGES, cwd=folder)
        run(python, "-m", "sm_flex", cwd=folder)


if __name__ == "__main__":
    main()
