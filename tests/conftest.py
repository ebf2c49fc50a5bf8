"""How the tests run: in several processes of one thread each where that helps, without a GPU in Triton's interpreter."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and for the programs that tests start
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # The Triton kernel runs in Triton's interpreter; it must know before it is decorated.
    os.environ["TRITON_INTERPRET"] = "1"

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("dev", max_examples=20, **_COMMON)
settings.register_profile("ci", max_examples=40, derandomize=True, **_COMMON)
settings.register_profile("nightly", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
MAX_WORKERS = 4
# Folders in the order in which workers take their files: the longest files first, so that none is left to the end.
LONGEST_FIRST = ("integrations", "runtime", "benchmarks", "core")


def workers(config: pytest.Config) -> int:
    """How many processes run the tests; 0 for this one alone.

    One is enough for a file or a few tests, which are over before a second has imported torch. Workers must not share a GPU.
    """
    option = config.option
    few = option.keyword or getattr(option, "lf", False) or option.usepdb or option.trace or option.collectonly
    folders = all((config.invocation_params.dir / arg).is_dir() for arg in config.args)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if few or not folders or "gpu" in option.markexpr or torch.cuda.is_available() or cores == 1:
        return 0
    return min(cores, MAX_WORKERS)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """As if called with -n, a file to a worker, where pytest-xdist is installed and the caller has not said it."""
    option = config.option
    if IS_WORKER or getattr(option, "numprocesses", 0) is not None or option.dist != "no":
        return
    option.numprocesses = workers(config)
    # The gpu tests on the model take as long as their file is, and few files there are long.
    split = "worksteal" if "cuda_model" in option.markexpr else "loadfile"
    option.dist = split if option.numprocesses else "no"
    option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "census" not in config.option.markexpr:  # minutes long: only where it is asked for by name
        left_out = [item for item in items if item.get_closest_marker("census")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if IS_WORKER:
        items.sort(key=lambda item: [name not in item.path.parts for name in LONGEST_FIRST])
    if torch.cuda.is_available():
        return
    on_model = "cuda_model" in config.option.markexpr
    for item in items:
        if "gpu" not in item.keywords:
            continue
        item.add_marker("cuda_model")
        card = item.get_closest_marker("card")
        if not on_model:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        elif card is not None:
            item.add_marker(pytest.mark.skip(reason=f"no CUDA device: {card.args[0]}"))
        # Triton's interpreter computes both sides of a where() in numpy, which warns of inf - inf.
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What came of the census: the tests' reports carry it, so that it arrives from the workers of pytest-xdist too."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    found: dict[str, dict[str, Any]] = {}
    for attention, model_type, outcomes in [x for report in reports for name, x in report.user_properties if name == "census"]:
        found.setdefault(attention, {})[model_type] = outcomes
    for attention, outcomes in found.items():
        from tests.helpers.census.report import lines, revive

        terminalreporter.section(f"census of {attention}")
        for line in lines(revive(outcomes)):
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_deprecated(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Transformers logs some of its deprecations instead of warning, and each once only."""
    yield
    logged = [record.getMessage() for record in caplog.get_records("call") if record.name.startswith("transformers")]
    assert not [message for message in logged if "deprecated" in message]


@pytest.fixture
def cuda_model() -> Iterator[None]:
    """CPU tensors take the CUDA paths, down to a model of the ops (tests/helpers/cuda_model)."""
    from tests.helpers.cuda_model import installed

    with installed():
        yield


@pytest.fixture
def one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: all rows of a head in one tile, since Triton's interpreter takes 40 ms for one of any size."""
    if not torch.cuda.is_available() and find_spec("triton"):
        from sm_flex.epilogue import kernel

        monkeypatch.setattr(kernel, "TILE_BYTES", 2**20)
        monkeypatch.setattr(kernel, "MAX_ROWS", 512)


@pytest.fixture
def plain_epilogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the formula in PyTorch, where the kernel takes too long in the interpreter, or cannot run there."""
    if not torch.cuda.is_available():
        from sm_flex.epilogue import remask

        monkeypatch.setattr(remask, "kernel", None)


@pytest.fixture(autouse=True)
def _cuda_model_without_a_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("cuda_model"):
        request.getfixturevalue("cuda_model")


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()
