"""What every benchmark shares: its command line, where its result comes from, and the files that say so.

A result file is <what>_<machine>_<yyyymm>.md, with a .json, and perhaps a .png, of the same name: a header
with the device, the versions, the commit and the command, then tables. Scripts write these files, nobody
edits them.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

if TYPE_CHECKING:  # torchtitan's extra has no matplotlib
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
# What a run writes by default is not under version control; maintainers pass --out benchmarks/results.
OUT = Path("benchmarks/out")


class Parser(argparse.ArgumentParser):
    """The options of ``python -m benchmarks.<name>``; bad input is one line on stderr and exit code 2."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(prog=f"python -m benchmarks.{name}", description=description)
        self.name, self.argv, self._least = name, [], {}

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)

    @contextmanager
    def refusing(self, *errors: type[Exception]) -> Iterator[None]:
        """OSError, ValueError and errors raised within are bad input."""
        try:
            yield
        except (OSError, ValueError, *errors) as error:
            self.error(str(error))

    def number(self, option: str, default: int | None, meaning: str, least: int = 1) -> None:
        """An option that takes an integer, least or above."""
        shown = "" if default is None else " (default %(default)s)"
        self.add_argument(option, type=int, default=default, help=meaning + shown)
        self._least[option] = least

    def text(self, where: Any = None) -> None:
        meaning = "file or folder of UTF-8 text (default: Python's standard library)"
        (where or self).add_argument("--text", type=Path, help=meaning)

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        """argv, or the process's own, checked; --out is every benchmark's."""
        self.add_argument("--out", type=Path, default=OUT, help="folder for the results (default %(default)s)")
        self.argv = sys.argv[1:] if argv is None else argv
        args = self.parse_args(self.argv)
        for option, least in self._least.items():
            value = getattr(args, option[2:].replace("-", "_"))
            if value is not None and value < least:
                self.error(f"{option} must be at least {least}, got {value}")
        return args


class Result:
    """The files of one run, <folder>/<what>_<machine>_<yyyymm>; machine: cpu2 (two cores), or the GPU's name.

    Made before the run, to refuse a bad folder and to name the commit that runs.
    """

    def __init__(self, parser: Parser, folder: Path, what: str, device: torch.device, **source: str) -> None:
        name = _gpu_name(device) or f"{device.type}{num_cores()}"
        machine = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        self.name = parser.name
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"--out: {folder} is not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"--out: {folder} is not writable")
        self.stem = folder / f"{what}_{machine}_{_now():%Y%m}"
        self.source = environment(shlex.join(["python", "-m", f"benchmarks.{parser.name}", *parser.argv]), device) | source

    def path(self, suffix: str) -> Path:
        return self.stem.with_name(self.stem.name + suffix)

    def write(
        self, title: str, tables: str, notes: str, record: dict[str, Any], figures: "Mapping[str, Figure | None] | None" = None
    ) -> None:
        """.md for people (title, source, tables, figures, notes) and .json for programs (record and source).

        A figure's key is the suffix of its file's name; the file of None is there already.
        """
        paths = {self.path(f"{suffix}.png"): figure for suffix, figure in (figures or {}).items()}
        for path, figure in paths.items():
            if figure is not None:
                figure.savefig(path)
        header = "\n".join(f"- {key}: {value}" for key, value in self.source.items())
        shown = [f"![{path.stem}]({path.name})" for path in paths]
        text = "\n\n".join([f"# {title}", header, tables, *shown, notes.strip()])
        self.path(".md").write_text(text + "\n", encoding="utf-8")
        saved = {"benchmark": self.name, **record, "source": self.source}
        self.path(".json").write_text(json.dumps(saved, separators=(",", ":")) + "\n", encoding="utf-8")

    def publish(
        self, title: str, tables: str, notes: str, record: dict[str, Any],
        figures: "Mapping[str, Figure] | None" = None, summary: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Writes, and prints the tables, the files' names, and summary (or record) as one line of JSON."""
        self.write(title, tables, notes, record, figures)
        names = [f"{suffix}.png" for suffix in figures or {}] + [".md", ".json"]
        print(tables, f"wrote {', '.join(str(self.path(name)) for name in names)}", sep="\n")
        print(json.dumps({"benchmark": self.name, **(record if summary is None else summary)}))


def environment(command: str, device: torch.device) -> dict[str, str]:
    """Everything needed to run it again: device, driver, cores, versions, commit, command, date."""
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device.type == "cuda" else None
    return {
        "device": _gpu_name(device) or f"{device.type} ({_cpu_name()})",
        "driver": driver.splitlines()[0] if driver else "none",
        "cores": str(num_cores()),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "command": command,
        "date": f"{_now():%Y-%m-%d}",
    }


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) + "."


def mean_and_range(values: Sequence[float], form: str) -> str:
    """Over seeds: the mean, and of several the lowest and the highest."""
    span = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{span}"


def median_and_fifths(values: Sequence[float]) -> dict[str, float]:
    """Over repetitions: median, p20, p80 (of three or fewer, which have no fifths, the range) and how many."""
    fifths = statistics.quantiles(values, n=5) if len(values) > 3 else [min(values), 0.0, 0.0, max(values)]
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3], "rounds": len(values)}


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now(device: torch.device) -> float:
    """Seconds, once the device is done."""
    synchronize(device)
    return time.perf_counter()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def num_cores() -> int:
    """The cores that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@functools.cache  # the code that runs is the one that was loaded
def commit(folder: Path = ROOT) -> str:
    """The short hash of HEAD in a checkout, with -dirty where anything but result files differs from it."""
    head = _output("git", "-C", str(folder.absolute()), "rev-parse", "--short", "HEAD")
    if head is None:
        return "unknown"
    changed = _output("git", "-C", str(folder.absolute()), "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"{head}-dirty" if changed else head


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
