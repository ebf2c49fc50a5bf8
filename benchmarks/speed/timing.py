"""How benchmarks.speed measures: fair clocks for several variants at once, and the memory that they need.

Variants take turns within a round, in reversed order every other round: a machine that slows down slows all
of them. A ratio is the median over rounds of two times of the same round. Inputs rotate over sets that
together exceed twice the L2 cache. On a GPU a time is that between two CUDA events, behind a pause that lets
the host run ahead: it is the device's own, and the host's is reported beside it.
"""

import statistics
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import report

MODES = ("forward", "backward", "forward+backward")
# q, k, v (and a learned sink) that want gradients, and last the gradient of the output.
Inputs = tuple[Tensor, ...]
Call = Callable[..., Tensor]
# About 2 ms of an H100, more than the host needs to launch a forward and a backward pass.
PAUSE_CYCLES = 4_000_000
LEAST_ROUNDS, MOST_ROUNDS = 5, 60


class Clock:
    """Marks along a run, read once the device is done."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks, self.begin, self.host = device, [], 0.0, 0.0
        if device.type == "cuda":
            torch.cuda._sleep(PAUSE_CYCLES)

    def mark(self) -> None:
        now = time.perf_counter()
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(now)
        self.begin = self.begin or now
        self.host = 1e3 * (now - self.begin)

    def milliseconds(self) -> list[float]:
        """Between each mark and the next."""
        steps = zip(self.marks, self.marks[1:], strict=False)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [a.elapsed_time(b) for a, b in steps]
        return [1e3 * (b - a) for a, b in steps]


def train(call: Call, inputs: Inputs, device: torch.device, backward: bool = True) -> Clock:
    """Runs the call once forward and once backward, or forward alone without gradients."""
    *leaves, grad = inputs
    leaves = leaves if backward else [x.detach() for x in leaves]
    clock = Clock(device)
    clock.mark()
    with torch.set_grad_enabled(backward):
        out = call(*leaves)
    clock.mark()
    if backward:
        torch.autograd.grad(out, leaves, grad, allow_unused=True)  # a gradient that is missing is for the check to find
        clock.mark()
    return clock


def interleaved(names: Iterable[str], seconds: float, least: int, most: int) -> Iterator[tuple[int, list[str]]]:
    """(number, variants in order) of each round: at least and at most so many, until seconds are over."""
    start, names = time.perf_counter(), list(names)
    for count in range(most):
        if count >= least and time.perf_counter() - start >= seconds:
            return
        yield count, names if count % 2 == 0 else names[::-1]


def rounds(
    calls: dict[str, Call], sets: Sequence[Inputs], device: torch.device, seconds: float,
    least: int = LEAST_ROUNDS, forward_only: Container[str] = (),
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:  # fmt: skip
    """({variant: {mode: ms per round}}, {variant: why it failed}); calls are warm; a failure ends a variant.

    Those of forward_only run without gradients and have that one mode.
    """
    errors: dict[str, str] = {}
    found: dict[str, dict[str, list[float]]] = {
        name: {mode: [] for mode in (MODES[:1] if name in forward_only else (*MODES, "host"))} for name in calls
    }
    for count, names in interleaved(calls, seconds, least, max(least, MOST_ROUNDS)):
        clocks = {}
        for name in names:
            if name not in errors:
                try:
                    clocks[name] = train(calls[name], sets[count % len(sets)], device, name not in forward_only)
                except Exception as error:  # an error is a row of the result
                    errors[name] = one_line(error)
        for name, clock in clocks.items():
            steps = clock.milliseconds()
            for mode, ms in zip(found[name], (*steps, sum(steps), clock.host), strict=False):
                found[name][mode].append(ms)
    return {name: modes for name, modes in found.items() if name not in errors}, errors


def turns(
    calls: dict[str, Callable[[int], Any]], device: torch.device, seconds: float, wall: bool = False
) -> dict[str, list[float]]:
    """Milliseconds of calls without gradients; each gets the number of the round, to choose its inputs by.

    wall: from before the call until the device is done, as a host that waits for it sees it.
    """
    for call in calls.values():
        for i in range(3):
            call(i)
    report.synchronize(device)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for count, names in interleaved(calls, seconds, 10, 200):
        for name in names:
            if wall:
                begin = report.now(device)
                calls[name](count)
                found[name].append(1e3 * (report.now(device) - begin))
            else:
                clock = Clock(device)
                clock.mark()
                calls[name](count)
                clock.mark()
                found[name] += clock.milliseconds()
    return found


def num_sets(size: int, device: torch.device) -> int:
    """How many sets of inputs of a size (bytes) exceed twice the L2 cache; at least two."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2 << 20
    return max(2, min(32, -(-2 * l2 // size)))


def input_sets(
    batch: int, length: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, device: torch.device
) -> list[Inputs]:
    """Random (B, H, S, D) in the (B, S, H, D) memory that the projections of a model leave."""

    def tensor(n: int) -> Tensor:
        return torch.randn(batch, length, n, dim, device=device, dtype=dtype).transpose(1, 2)

    def one() -> Inputs:
        q, k, v = [tensor(n).requires_grad_() for n in (heads[0], heads[1], heads[1])]
        return q, k, v, tensor(heads[0])

    return [one() for _ in range(num_sets(2 * batch * length * dim * sum(heads) * dtype.itemsize, device))]


def copy_bandwidth(device: torch.device, seconds: float = 0.5) -> float:
    """GB/s of a copy, bytes read and written, of a tensor far beyond the caches."""
    source = torch.zeros((1 << 30) if device.type == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = statistics.median(turns({"copy": lambda _: target.copy_(source)}, device, seconds)["copy"])
    return 2 * source.numel() / ms / 1e6


def training_peak(call: Call, inputs: Inputs, device: torch.device) -> int:
    """Bytes held at most in a forward and a backward pass, inputs included, by PyTorch's allocator."""
    return peak_of(lambda: train(call, inputs, device), inputs, device)


def peak_of(run: Callable[[], Any], inputs: Inputs, device: torch.device) -> int:
    """Bytes held at most in run, inputs included, by PyTorch's allocator."""
    own = sum(x.numel() * x.element_size() for x in inputs)
    if device.type == "cuda":
        report.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        report.synchronize(device)
        return own + torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        run()
    assert found.profiler is not None
    assert found.profiler.kineto_results is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        most = max(most, held)
    return own + most


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or that a CPU's machine and its container still have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo", encoding="utf-8") as lines:
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
        free = min(free, int(limit) - int((group / "memory.current").read_text()))
    return free


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median and fifths of ours over theirs, round by round."""
    return report.median_and_fifths([a / b for a, b in zip(ours, theirs, strict=True)])


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
