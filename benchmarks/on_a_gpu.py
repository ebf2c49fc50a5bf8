"""All that only a GPU can show, in one command, in order, written to one report.

    python -m benchmarks.on_a_gpu --out benchmarks/results

Memory checks, the tests marked gpu file by file, the epilogue's kernel with one warp and with four, then speed.
Each step is a process with a time limit; one that fails or runs out of time is noted and the next one starts.
The report, on_a_gpu_<machine>_<yyyymm>.md, holds each step's command, exit status, seconds and the end of what
it printed. It is written after every step, so that a run that is cut off leaves what it has. The whole takes
about an hour and a half at most, and as much less as --minutes says.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import report

TAIL = 40
PYTEST = ("-m", "pytest", "-n0", "-q", "-m", "gpu")
FOUR_WARPS = "import runpy, sys, sm_flex.epilogue.kernel as k; k.NUM_WARPS = 4; runpy.run_module({!r}, run_name='__main__')"


class Step(NamedTuple):
    """command is run where needs, a program, is installed, for so many minutes at most.

    out: it takes --out, which is this folder in that of the report.
    """

    name: str
    command: Sequence[str]
    minutes: float
    needs: str | None = None
    out: str | None = None


def _tests(name: str, minutes: float, *options: str) -> Step:
    return Step(name, (sys.executable, *PYTEST, f"tests/gpu/test_{name}.py", *options), minutes)


def _checked(name: str, minutes: float, *options: str) -> Step:
    command = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *_tests(name, minutes, *options).command)
    return Step(f"memcheck: {name}", command, minutes, needs="compute-sanitizer")


def _with_four_warps(name: str, module: str, minutes: float, *arguments: str, out: str | None = None) -> Step:
    return Step(name, (sys.executable, "-c", FOUR_WARPS.format(module), *arguments), minutes, out=out)


SPEED = (sys.executable, "-m", "benchmarks.speed")
STEPS = (
    _checked("sdpa", 8, "-k", "boolean_mask and efficient"),
    _tests("kernel", 4),
    _with_four_warps("kernel, four warps", "pytest", 4, *PYTEST[2:], "tests/gpu/test_kernel.py"),
    _tests("engines", 8),
    _tests("sdpa", 6),
    _tests("varlen", 6),
    _tests("flash_attn", 6),
    _tests("sink_value", 6),
    _tests("faults", 6),
    Step("epilogue", (*SPEED, "--only", "epilogue", "--minutes", "3"), 5, out="epilogue"),
    _with_four_warps(
        "epilogue, four warps", "benchmarks.speed", 5, "--only", "epilogue", "--minutes", "3", out="epilogue-four-warps"
    ),
    _tests("runtime", 6),
    _tests("compile", 10),
    Step("speed", SPEED, 12, out="."),
    Step("titan_speed", (sys.executable, "-m", "benchmarks.titan_speed"), 12, out="."),
    _checked("varlen", 8),
)


class Outcome(NamedTuple):
    """status: an exit code, "skipped" or "timeout"."""

    step: Step
    status: int | str
    seconds: float
    tail: str

    @property
    def good(self) -> bool:
        return self.status in (0, "skipped")


def run(step: Step, out: Path) -> Outcome:
    """One step in a process group of its own, of which nothing is left."""
    if step.needs is not None and shutil.which(step.needs) is None:
        return Outcome(step, "skipped", 0.0, f"{step.needs} is not installed")
    command = [*step.command, *([] if step.out is None else ["--out", str(out / step.out)])]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(command, cwd=report.ROOT, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | str = process.wait(60 * step.minutes)
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        printed.seek(0)
        lines = printed.read().decode(errors="replace").replace("\r", "\n").splitlines()
    return Outcome(step, status, time.perf_counter() - start, "\n".join(lines[-TAIL:]))


def write(result: report.Result, steps: Sequence[Step], outcomes: Sequence[Outcome]) -> None:
    done = [(x.step.name, x.status, f"{x.seconds:.0f}", f"`{_shown(x.step)}`") for x in outcomes]
    left = [(step.name, "not run yet", "", f"`{_shown(step)}`") for step in steps[len(outcomes) :]]
    table = report.markdown_table(("step", "exit status", "seconds", "command"), [*done, *left])
    tails = [f"## {x.step.name}: {x.status}\n\n```\n{x.tail}\n```" for x in outcomes]
    notes = (
        "Exit status 0 is success; timeout means that the step was ended when its time was over. Below each step stands the end "
        "of what it printed. The steps that time write result files of their own, beside this one or in a folder beside it."
    )
    record: dict[str, Any] = {"steps": [{"step": x.step.name, "status": x.status, "seconds": x.seconds} for x in outcomes]}
    result.write("On a GPU: what only one can show", "\n\n".join([table, *tails]), notes, record)


def _shown(step: Step) -> str:
    """The command as a person would type it; a pipe would end a cell of the table."""
    words = ["python" if word == sys.executable else word for word in step.command]
    return " ".join(f'"{word}"' if " " in word else word for word in words).replace("|", "or")


def main(argv: list[str] | None = None, steps: Sequence[Step] = STEPS, device: torch.device | None = None) -> int:
    parser = report.Parser("on_a_gpu", "All that only a GPU can show, in order, in one report.")
    parser.add_argument("--minutes", type=float, default=90.0, help="for all steps together (default %(default)s)")
    args = parser.parse(argv)
    device = device or report.pick_device()
    if device.type != "cuda" and steps is STEPS:
        parser.error("there is no CUDA device")
    with parser.refusing():
        result = report.Result(parser, args.out, "on_a_gpu", device)
    end = time.perf_counter() + 60 * args.minutes
    outcomes: list[Outcome] = []
    write(result, steps, outcomes)
    for step in steps:
        left = (end - time.perf_counter()) / 60
        if left <= 0:
            outcomes.append(Outcome(step, "skipped", 0.0, "the time for all steps together was over"))
        else:
            print(f"{step.name} ...", end=" ", flush=True)
            outcomes.append(run(step._replace(minutes=min(step.minutes, left)), args.out.absolute()))
            print(outcomes[-1].status, flush=True)
        write(result, steps, outcomes)
    bad = [x.step.name for x in outcomes if not x.good]
    print(f"wrote {result.path('.md')}", f"failed: {', '.join(bad)}" if bad else "no step failed", sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
