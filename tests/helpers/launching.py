"""For the tests of the launchers: a copy of a stand-in checkout, to run scripts in, in this process or in another."""

import hashlib
import importlib
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.helpers import ROOT


class Checkout:
    """A stand-in in a temporary folder, which is the working directory; forget() its modules between two runs."""

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        self._path = list(sys.path)
        shutil.copytree(ROOT / "tests" / "helpers" / "standins" / name, folder, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", list(sys.argv))

    def forget(self) -> None:
        """As in a new process: no module of any checkout, and sys.path as it was."""
        self._monkeypatch.setattr(sys, "path", list(self._path))
        for name, module in list(sys.modules.items()):
            spec = getattr(module, "__spec__", None)  # scripts/ is a namespace, which has no file
            places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
            if any(place is not None and Path(place).is_relative_to(self.folder) for place in places):
                del sys.modules[name]

    def module(self, name: str) -> ModuleType:
        """A fresh module of the checkout."""
        self.forget()
        self._monkeypatch.syspath_prepend(self.folder)
        return importlib.import_module(name)

    def loaded(self, name: str) -> ModuleType:
        """A module of the checkout as the last run left it."""
        return sys.modules[name]

    def run(self, main: Callable[[Sequence[str]], None], *argv: str) -> None:
        """A launcher's main, in this process."""
        self.forget()
        main(argv)

    def plain(self, script: str, *argv: str) -> None:
        """The script without a launcher, as `python script` or `python -m script`, in this process."""
        self.forget()
        self._monkeypatch.syspath_prepend(self.folder)
        self._monkeypatch.setattr(sys, "argv", [script, *argv])
        if script.endswith(".py"):
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)

    def python(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Another process, in which the integrations are installed."""
        path = os.pathsep.join([str(ROOT), str(ROOT / "integrations")])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, *argv], cwd=self.folder, env=env, capture_output=True, text=True, check=False)

    def hashes(self) -> dict[str, str]:
        """Every file but what Python compiles, and what a script writes to out/."""
        files = [f for f in sorted(self.folder.rglob("*")) if f.is_file()]
        kept = [f for f in files if "__pycache__" not in f.parts and f.relative_to(self.folder).parts[0] != "out"]
        return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in kept}


@contextmanager
def checked_out(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkout]:
    made = Checkout(name, folder, monkeypatch)
    yield made
    made.forget()


def write_text(folder: Path, letters: int = 29, count: int = 600) -> None:
    """train.bin, val.bin and meta.pkl of a text that can be learnt: letters in order, with a jump now and then."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        steps = np.where(generator.random(count) < 0.2, generator.integers(0, letters, count), 1)
        (np.cumsum(steps) % letters).astype(np.uint16).tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": letters}))


def refusal(run: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a run that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line
