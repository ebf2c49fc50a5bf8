"""Where a result comes from, and the file that says so: shared by every benchmark of this folder.

A result file is <what>_<machine>_<yyyymm>.md (with a .json, and perhaps a .png, of the same name): a header with the
device, the versions, the commit and the command, then a table. Scripts write these files, nobody edits them.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

ROOT = Path(__file__).resolve().parent.parent
# What a run writes by default is not under version control; maintainers pass --out benchmarks/results.
OUT = Path("benchmarks/out")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that refuses bad input in one line on stderr, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


def out_folder(path: Path) -> Path:
    """path as a folder that can be written to, made if need be; OSError, before any work is done, if it cannot be."""
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"--out: {path} is not a folder")
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(f"--out: {path} is not writable")
    return path


def at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{option} must be at least {least}, got {value}")


def result_stem(folder: Path, what: str, device: torch.device) -> Path:
    """folder/<what>_<machine>_<yyyymm>, to which a suffix is added; machine is cpu2 (two cores) or the GPU's name."""
    name = _gpu_name(device) or f"{device.type}{num_cores()}"
    machine = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return folder / f"{what}_{machine}_{_now():%Y%m}"


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


def write(stem: Path, title: str, source: dict[str, str], table: str, notes: str, record: dict[str, Any]) -> None:
    """stem.md for people (title, source, table, notes) and stem.json for programs (record and source)."""
    header = "\n".join(f"- {key}: {value}" for key, value in source.items())
    text = f"# {title}\n\n{header}\n\n{table}\n\n{notes.strip()}\n"
    stem.with_name(stem.name + ".md").write_text(text, encoding="utf-8")
    stem.with_name(stem.name + ".json").write_text(json.dumps({**record, "source": source}, separators=(",", ":")) + "\n", encoding="utf-8")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def num_cores() -> int:
    """The cores that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


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
    return datetime.datetime.now(datetime.timezone.utc)
