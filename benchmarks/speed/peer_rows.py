"""Peers beside StableMask of the same mass: what each gets wrong, the memory it holds, and its time.

Each is held against eq. 11 in float64 first, the gradient of a learned sink included, in a pass that also counts the
bytes it holds. StableMask itself is not timed where it is wrong. A peer is, and what is wrong stands beside its
time. One whose backward raises runs again without gradients. One that is not installed, or needs more memory than
there is, is a row that says so.
"""

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.speed.cases import DTYPES, Case
from benchmarks.speed.check import ROWS, TOLERANCE
from benchmarks.speed.peers import ALL, FIXED, HEADWISE, LEARNED, MASSES, Peer, ours
from benchmarks.speed.timing import Call, Inputs, free_memory, input_sets, one_line, peak_of, ratio, rounds, train, training_peak
from benchmarks.speed.variants import Setup, setup
from sm_flex.testing import oracle

Row = dict[str, Any]
OURS = "sm_flex"
SHARE_OF_MEMORY = 0.7
# Lengths at which a dense peer's bytes are followed, to know those of a longer call.
PROBES = (256, 512)
# Up to here every row of the last batch entry is checked, beyond it the first and the last ROWS.
CHECK_ALL = 1024
# A peer's error that is so many times ours is worth a word.
MUCH = 4.0
NAMES = ("out", "dq", "dk", "dv", "d sink")


class Pass(NamedTuple):
    errors: dict[str, float]
    wrong: list[str]
    peak: int
    seconds: float


def peer_rows(case: Case, device: torch.device, seconds: float) -> list[Row]:
    at = setup(case._replace(engines=()), device)
    sets = [with_sink(x) for x in _inputs(case, device)]
    exact = Reference(at, sets[0])
    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    forward_only: dict[str, str] = {}  # of a mass: the peer's name, what it is compared with
    masses = [mass for mass in MASSES if any(ALL[key].mass == mass for key in case.engines)]
    took = 0.0
    for mass in masses:
        name = f"{OURS}, {mass}"
        rows[name] = {"variant": name, "role": OURS, "mass": mass}
        call = ours(at, mass)
        found = exact.judge(call, mass, backward=True)
        if found.wrong:
            rows[name]["error"] = "; ".join(found.wrong)
            continue
        rows[name] |= {"check": max(found.errors.values()), "errors": found.errors, "peak_bytes": found.peak}
        calls[name], took = call, took + found.seconds
    for peer in (ALL[key] for key in case.engines):
        row = rows[peer.name] = {"variant": peer.name, "role": "peer", "mass": peer.mass}
        try:
            call = peer.build(at)
            needed = needed_bytes(peer, case, device) if peer.dense else 0
        except ModuleNotFoundError as error:
            row["why"] = f"not installed: no module {error.name}; pip install sm-flex[peers]"
            continue
        except Exception as error:  # an error is a row of the result
            row["error"] = one_line(error)
            continue
        free = free_memory(device)
        if needed > SHARE_OF_MEMORY * free:
            row["why"] = f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
            continue
        found = _try(exact, call, peer, row)
        if found is None:
            continue
        if not row["backward"]:
            forward_only[peer.name] = peer.mass
        row |= {"check": max(found.errors.values()), "errors": found.errors, "peak_bytes": found.peak}
        row["wrong"] = row["wrong"] + found.wrong + _much(found.errors, rows.get(f"{OURS}, {peer.mass}", {}), case.dtype)
        calls[peer.name], took = call, took + found.seconds
    for mass in dict.fromkeys(forward_only.values()):
        _without_gradients(exact, at, mass, rows, calls)
    alone = {name for name, row in rows.items() if not row.get("backward", True)}
    least = 5 if took < 1.5 else 3 if took < 10 else 2 if took < 30 else 1
    times, errors = rounds(calls, sets, device, seconds, least, alone)
    for name, error in errors.items():
        rows[name]["error"] = error
    for name, modes in times.items():
        row, other = rows[name], _partner(rows[name])
        row["ms"] = {mode: report.median_and_fifths(values) for mode, values in modes.items()}
        if row["role"] == "peer" and other in times:
            row["against"] = other
            row["ratio"] = {OURS: {mode: ratio(modes[mode], times[other][mode]) for mode in modes}}
            row["peak_ratio"] = row["peak_bytes"] / rows[other]["peak_bytes"]
    return [{key: value for key, value in row.items() if key != "errors"} for row in rows.values()]


def _partner(row: Row) -> str:
    return f"{OURS}, {row['mass']}" + ("" if row.get("backward", True) else ", no gradients")


def _without_gradients(exact: "Reference", at: Setup, mass: str, rows: dict[str, Row], calls: dict[str, Call]) -> None:
    """Ours once more, forward alone, for those that have no backward."""
    row = {"variant": f"{OURS}, {mass}, no gradients", "role": OURS, "mass": mass, "backward": False}
    found = exact.judge(ours(at, mass), mass, backward=False)
    rows[row["variant"]] = row | {"check": max(found.errors.values()), "peak_bytes": found.peak}
    if found.wrong:
        rows[row["variant"]]["error"] = "; ".join(found.wrong)
    else:
        calls[row["variant"]] = ours(at, mass)


def _try(exact: "Reference", call: Call, peer: Peer, row: Row) -> Pass | None:
    """With gradients, and where that raises without; None where that raises too, and the row says why."""
    row["wrong"] = []
    for backward in (True, False):
        row["backward"] = backward
        try:
            return exact.judge(call, peer.mass, backward)
        except Exception as error:  # an error is a row of the result
            if exact.device.type == "cuda":
                torch.cuda.empty_cache()
            if not backward or isinstance(error, torch.OutOfMemoryError):
                row["error"] = one_line(error)
                return None
            while error.__cause__ is not None:  # the compiler wraps what a function raises
                error = error.__cause__
            row["wrong"] = [f"no backward: {one_line(error)[:80]}"]
    return None


def _much(theirs: dict[str, float], own: Row, dtype: str) -> list[str]:
    """What is within tolerance, but far less exact than ours."""
    times = {name: error / own["errors"][name] for name, error in theirs.items() if own.get("errors", {}).get(name)}
    worth = {name for name, error in theirs.items() if TOLERANCE[dtype] / 50 < error <= TOLERANCE[dtype]}
    return [f"{name}: {x:.0f} times our error" for name, x in times.items() if x >= MUCH and name in worth]


def _inputs(case: Case, device: torch.device) -> list[Inputs]:
    return input_sets(case.batch, case.length, (case.heads, case.kv_heads), case.head_dim, DTYPES[case.dtype], device)


def with_sink(inputs: Inputs) -> Inputs:
    """A learned sink in the dtype of the call, as a model in that dtype holds it."""
    q, k, v, grad = inputs
    sink = torch.linspace(-1.0, 2.0, q.shape[1], device=q.device, dtype=q.dtype).requires_grad_()
    return q, k, v, sink, grad


def needed_bytes(peer: Peer, case: Case, device: torch.device) -> float:
    """Of a training pass: b S + c S^2 for each batch entry, from two short calls. No backward: from none."""
    peaks = []
    for length in PROBES:
        short = case._replace(length=length, batch=1, engines=())
        inputs = with_sink(_inputs(short, device)[0])
        call = peer.build(setup(short, device))
        try:
            peaks.append(training_peak(call, inputs, device))
        except Exception:  # it says why when it is judged; forward alone it is estimated by
            peaks.append(peak_of(lambda call=call, inputs=inputs: train(call, inputs, device, False), inputs, device))
    n = PROBES[0]
    quadratic = max(0.0, (peaks[1] - 2 * peaks[0]) / (2 * n * n))
    linear = max(0.0, peaks[0] / n - quadratic * n)
    return case.batch * (linear * case.length + quadratic * case.length**2)


class Reference:
    """Eq. 11 in float64 on some rows of the last batch entry, for each mass.

    The gradient of the output is 0 outside these rows: so the gradients of every key, every value and of the
    sink are theirs alone, and can be compared whole.
    """

    def __init__(self, at: Setup, inputs: Inputs) -> None:
        *self.leaves, grad = inputs
        self.at, self.device, length = at, at.device, at.length
        ends = [slice(0, length)] if length <= CHECK_ALL else [slice(0, ROWS), slice(length - ROWS, length)]
        self.blocks = ends
        self.grad = torch.zeros_like(grad)
        for rows in ends:
            self.grad[-1, :, rows] = grad[-1, :, rows]
        self.known: dict[str, tuple[Tensor, ...]] = {}

    def wanted(self, mass: str) -> tuple[Tensor, ...]:
        """out, dq (of the rows), dk, dv (H, S, D) and d sink (H,)."""
        if mass in self.known:
            return self.known[mass]
        q, k, v, sink = (x.detach() for x in self.leaves)
        exact = [x[-1:].double().requires_grad_() for x in (q, k, v)] + [sink.double().requires_grad_()]
        gamma = self.at.gammas["headwise"].double() if mass == HEADWISE else torch.tensor(torch.inf, device=self.device)
        kept: Any = {LEARNED: exact[3], FIXED: 0.0, HEADWISE: None}[mass]
        outs, grads = [], [torch.zeros_like(x) for x in exact]
        for rows in self.blocks:
            keys = slice(0, rows.stop)
            positions = torch.arange(rows.start, rows.stop, device=self.device)
            out, _ = oracle(
                exact[0][:, :, rows], exact[1][:, :, keys], exact[2][:, :, keys],
                gamma=gamma, length=self.at.length, positions=positions, sink=kept,
            )  # fmt: skip
            outs.append(out.detach())
            found = torch.autograd.grad(out, exact, self.grad[-1:, :, rows].double(), allow_unused=True)
            for total, part in zip(grads, found, strict=True):
                if part is not None:
                    total += part
        dq = self._rows(grads[0])
        self.known[mass] = (torch.cat(outs, 2), dq, grads[1], grads[2], grads[3])
        return self.known[mass]

    def _rows(self, x: Tensor) -> Tensor:
        return torch.cat([x[-1:, :, rows] for rows in self.blocks], 2)

    def judge(self, call: Call, mass: str, backward: bool) -> Pass:
        """The errors of a call over the largest value of each tensor, what is wrong, and the bytes it holds."""
        held: list[Tensor | None] = []
        detached = [x.detach() for x in self.leaves]

        def run() -> None:
            held.clear()
            with torch.set_grad_enabled(backward):
                out = call(*(self.leaves if backward else detached))
            held.append(out)
            if backward:
                held.extend(torch.autograd.grad(out, self.leaves, self.grad.to(out.dtype), allow_unused=True))

        if hasattr(call, "_torchdynamo_orig_callable"):
            run()  # what compiling holds is no part of the peak
        begin = time.perf_counter()
        peak = peak_of(run, (*self.leaves, self.grad), self.device)
        seconds = time.perf_counter() - begin
        out, *grads = held
        assert out is not None
        wrong = [f"returns {out.dtype}".replace("torch.", "")] if out.dtype != self.leaves[0].dtype else []
        found = [self._rows(out)]
        if grads:
            dq, dk, dv, d_sink = grads
            found += [None if dq is None else self._rows(dq), *(None if x is None else x[-1:] for x in (dk, dv)), d_sink]
        errors = {}
        for name, theirs, exact in zip(NAMES, found, self.wanted(mass), strict=False):
            if name == "d sink" and mass != LEARNED:
                continue
            if theirs is None:
                wrong.append(f"{name} is dropped: None")
                continue
            error = float((theirs.detach().double() - exact).abs().max() / exact.abs().max())
            errors[name] = error
            if not error <= TOLERANCE[self.at.case.dtype]:
                wrong.append(f"{name} off by {error:.1e} of its largest value")
        return Pass(errors, wrong, peak, seconds)
