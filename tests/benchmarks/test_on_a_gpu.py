"""benchmarks.on_a_gpu with quick commands in the place of its steps; and that its own steps name what is there."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import on_a_gpu, report
from benchmarks.on_a_gpu import Step

CPU = torch.device("cpu")


def python(name: str, code: str, minutes: float = 1.0, **options: object) -> Step:
    return Step(name, (sys.executable, "-c", code), minutes, **options)  # pyright: ignore[reportArgumentType]


def test_every_step_is_run_and_kept_whatever_the_others_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sleep = "import time; time.sleep(99)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}]); open({str(tmp_path / 'no')!r}, 'w')"
    steps = [
        python("prints", "print('\\n'.join(f'line {i}' for i in range(100)))"),
        python("fails", "import sys; print('a reason', file=sys.stderr); sys.exit(3)"),
        python("hangs", child, minutes=2 / 60),
        python("lacks a tool", "", needs="no-such-program"),
        python("is given the folder", "import sys; print('folder', sys.argv[2])", out="sub"),
    ]
    start = time.perf_counter()
    assert on_a_gpu.main(["--out", str(tmp_path)], steps, CPU) == 1
    assert time.perf_counter() - start < 30
    assert "failed: fails, hangs\n" in capsys.readouterr().out
    (path,) = tmp_path.glob("on_a_gpu_*.md")
    text = path.read_text()
    for heading in ("prints: 0", "fails: 3", "hangs: timeout", "lacks a tool: skipped", "is given the folder: 0"):
        assert f"## {heading}\n" in text
    assert "line 60\nline 61" in text
    assert "line 59\n" not in text
    assert "a reason" in text
    assert f"folder {tmp_path / 'sub'}" in text
    assert "no-such-program is not installed" in text
    record = json.loads(path.with_suffix(".json").read_text())
    assert [step["status"] for step in record["steps"]] == [0, 3, "timeout", "skipped", 0]
    assert not (tmp_path / "no").exists()


def test_a_run_without_failures_and_one_without_time(tmp_path: Path):
    steps = [python("first", "pass"), python("second", "pass")]
    assert on_a_gpu.main(["--out", str(tmp_path)], steps, CPU) == 0
    assert on_a_gpu.main(["--out", str(tmp_path), "--minutes", "0"], steps, CPU) == 0
    (path,) = tmp_path.glob("on_a_gpu_*.md")
    assert path.read_text().count("the time for all steps together was over") == 2


def test_without_a_gpu_its_own_steps_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        on_a_gpu.main(["--out", str(tmp_path)], device=CPU)
    assert "there is no CUDA device" in capsys.readouterr().err


def test_its_own_steps_name_every_gpu_test_and_modules_that_are_there():
    words = [word for step in on_a_gpu.STEPS for word in step.command]
    named = {word for word in words if word.startswith("tests/")}
    assert named == {str(path.relative_to(report.ROOT)) for path in (report.ROOT / "tests/gpu").glob("test_*.py")}
    for module in (word for word in words if word.startswith("benchmarks.")):
        path = report.ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def test_four_warps_are_what_the_module_runs_with(tmp_path: Path):
    show = "import sm_flex.epilogue.kernel as k; print('warps', k.NUM_WARPS)"
    step = on_a_gpu._with_four_warps("", "timeit", 1, "-n1", "-r1", show)
    pytest.importorskip("triton", reason="this torch has no Triton (a CPU build)")
    outcome = on_a_gpu.run(step, tmp_path)
    assert outcome.status == 0, outcome.tail
    assert "warps 4" in outcome.tail
