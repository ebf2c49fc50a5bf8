"""StableMask against plain causal attention on the same engine, and against other baselines, in one run.

    python -m benchmarks.speed                  # on a GPU if there is one, 9 minutes; on a CPU 15
    pip install -e ".[bench,peers]"             # what others offer today, side by side

Forward, backward and both, bf16 (on a CPU fp32 too): plain causal, window, packed documents and ALiBi; head
dims, head counts and lengths at a constant number of tokens; every engine at hand, torchtitan's way and the
paper's formula; what a person would pick today for attention with a sink (peers.py); on a CPU how the cost
grows up to 64k. The figure to look at is the ratio of StableMask to the plain call of the same engine. Each
variant is held against eq. 11 first. Results are written after every case, so that a run that is cut off
leaves what it has. A variant that fails is a row with its error. When the time runs out, repetitions are cut
first, then the last of the cases (cases.py lists them by importance); the result names both.
"""

import gc
import json
import statistics
import time
import warnings
from typing import Any

import torch
from torch.nn import attention as torch_attention
from tqdm import tqdm

from benchmarks import report
from benchmarks.speed.cases import DTYPES, Case, expected_flops, flops, plan
from benchmarks.speed.check import error_of
from benchmarks.speed.decode import decode_rows
from benchmarks.speed.growth import growth_rows
from benchmarks.speed.parts import epilogue_rows, first_call_rows
from benchmarks.speed.peer_rows import peer_rows
from benchmarks.speed.peers import versions
from benchmarks.speed.report import targets_table, write
from benchmarks.speed.targets import judge
from benchmarks.speed.timing import MODES, copy_bandwidth, input_sets, one_line, ratio, rounds, train, training_peak
from benchmarks.speed.variants import AUTO, BASELINE, FLOOR, PLAIN, STABLEMASK, Variant, setup, variants

Row = dict[str, Any]
GROUPS = ("attention", "memory", "epilogue", "decode", "first call", "peers", "growth")
MINUTES = {"cuda": 9.0, "cpu": 15.0}
# Seconds of repetitions that a case is given at most, and those below which it is dropped instead.
MOST_SECONDS, LEAST_SECONDS = 5.0, 0.5
# What a case costs beside its repetitions before any has been seen: above all the compiler.
FIRST_GUESS = {"cuda": 15.0, "cpu": 2.0}
# TFLOP/s of plain causal attention before any was measured.
FIRST_RATE = {"cuda": 100.0, "cpu": 0.15}


class Budget:
    """Seconds of repetitions per case, so that all that are left fit; None where the next one does not."""

    def __init__(self, minutes: float, device: torch.device) -> None:
        self.end = time.perf_counter() + 60 * minutes
        self.setup = [FIRST_GUESS[device.type]]
        self.rates: list[float] = []
        self.first_rate = FIRST_RATE[device.type]

    def left(self) -> float:
        return self.end - time.perf_counter()

    def share(self, cases: int, flop: float = 0.0) -> float | None:
        """flop: what the next case is known to take beside its repetitions."""
        setup = sum(self.setup) / len(self.setup)
        needed = flop / 1e12 / (statistics.median(self.rates) if self.rates else self.first_rate)
        if self.left() < max(needed, min(setup, max(self.setup[-3:])) + LEAST_SECONDS):
            return None
        return min(MOST_SECONDS, max(LEAST_SECONDS, self.left() / cases - setup))

    def spent(self, seconds: float, rows: list[Row]) -> None:
        self.setup.append(max(0.0, seconds))
        self.rates += [row["tflops"]["forward+backward"] for row in rows if "forward+backward" in row.get("tflops", {})]


def measure(case: Case, device: torch.device, seconds: float, copy_gbps: float) -> list[Row]:
    """The rows of a case; whatever fails in it is a row too."""
    threads = torch.get_num_threads()
    try:
        if case.threads:
            torch.set_num_threads(case.threads)
        if case.impl:
            torch_attention.activate_flash_attention_impl(case.impl)
        if case.group == "epilogue":
            return epilogue_rows(case, device, copy_gbps, seconds)
        if case.group == "decode":
            return decode_rows(case, device, seconds)
        if case.group == "first call":
            return first_call_rows(case, device)
        if case.group == "peers":
            with warnings.catch_warnings(action="ignore"):  # what peers call is deprecated in part
                return peer_rows(case, device, seconds)
        if case.group == "growth":
            return growth_rows(case, device, copy_gbps, seconds)
        return attention_rows(case, device, seconds)
    except Exception as error:  # an error is a row of the result
        return [{"variant": "the whole case", "error": one_line(error)}]
    finally:
        if case.impl:
            torch_attention.restore_flash_attention_impl(_raise_warn=False)
        torch.set_num_threads(threads)
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def attention_rows(case: Case, device: torch.device, seconds: float) -> list[Row]:
    at = setup(case, device)
    batch, length = (1, case.batch * case.length) if case.kind == "packed" else (case.batch, case.length)
    sets = input_sets(batch, length, (case.heads, case.kv_heads), case.head_dim, DTYPES[case.dtype], device)
    made, timed = variants(at), case.group != "memory"
    rows: dict[str, Row] = {
        name: {"variant": name, "engine": v.engine, "role": v.role, "gamma": v.gamma} for name, v in made.items()
    }
    for name, variant in made.items():
        try:
            # The first run compiles, and says whether it is right; the second is warm.
            if timed and variant.gamma:
                rows[name]["check"] = error_of(variant, at, sets[0])
            elif timed:
                train(variant.call, sets[0], device, variant.backward)
            if (device.type == "cuda" or not timed) and variant.backward:
                rows[name]["peak_bytes"] = training_peak(variant.call, sets[-1], device)
        except Exception as error:  # an error is a row of the result
            rows[name]["error"] = one_line(error)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if timed:
        good = {name: variant.call for name, variant in made.items() if "error" not in rows[name]}
        alone = {name for name, variant in made.items() if not variant.backward}
        times, errors = rounds(good, sets, device, seconds, forward_only=alone)
        for name, error in errors.items():
            rows[name]["error"] = error
        for name, modes in times.items():
            ms = {mode: report.median_and_fifths(values) for mode, values in modes.items()}
            tflops = {mode: flops(case, mode) / ms[mode]["median"] / 1e9 for mode in MODES if mode in ms}
            rows[name] |= {"ms": ms, "tflops": tflops, "backward": made[name].backward}
            others = partners(name, made, times)
            rows[name]["ratio"] = {
                against: {mode: ratio(modes[mode], times[other][mode]) for mode in modes if mode in times[other]}
                for against, other in others.items()
            }
            least = times.get(f"{made[name].engine}, floor")
            if least is not None and made[name].role == STABLEMASK and made[name].gamma == "headwise":
                plain = times[others["same engine"]]["forward"]
                beyond = [(a - b) / c for a, b, c in zip(modes["forward"], least["forward"], plain, strict=True)]
                rows[name]["beyond floor"] = report.median_and_fifths(beyond)
    for name, row in rows.items():
        other = partners(name, made, rows).get("same engine", name)
        if other != name and "peak_bytes" in row and "peak_bytes" in rows[other]:
            row["peak_ratio"] = row["peak_bytes"] / rows[other]["peak_bytes"]
    return list(rows.values())


def partners(name: str, made: dict[str, Variant], among: dict[str, Any]) -> dict[str, str]:
    """What a variant is compared with, of those that were measured: {kind of comparison: name}."""
    variant = made[name]
    plain = {made[n].engine: n for n in among if made[n].role == PLAIN}
    found = {}
    if variant.role in (STABLEMASK, FLOOR) and variant.engine in plain:
        found["same engine"] = plain[variant.engine]
    if variant.role == AUTO:
        timed = {n: sum(among[n]["forward+backward"]) for n in plain.values() if "forward+backward" in among[n]}
        if timed:
            found["fastest plain"] = min(timed, key=lambda n: timed[n])
    if variant.role in (AUTO, BASELINE) and "flex" in plain:
        found["compiled flex"] = plain["flex"]
    if variant.role == BASELINE:
        ours = [n for n in among if made[n].role in (STABLEMASK, AUTO) and made[n].gamma == variant.gamma]
        if ours:
            found["StableMask"] = ours[0]
    return found


def run(cases: list[Case], device: torch.device, minutes: float, result: report.Result) -> dict[str, Any]:
    """Measures case after case and writes the record after each."""
    budget = Budget(minutes, device)
    record: dict[str, Any] = {"rows": [], "dropped": [], "minutes": minutes, "repetition seconds": MOST_SECONDS}
    record["copy GB/s"] = copy_bandwidth(device)
    for i, case in enumerate(tqdm(cases, unit="case", dynamic_ncols=True)):
        seconds = None if "stopped" in record else budget.share(len(cases) - i, expected_flops(case))
        if seconds is None:
            record["dropped"].append(case.name)
            continue
        start = time.perf_counter()
        found = measure(case, device, seconds, record["copy GB/s"])
        if any("ms" in row for row in found):
            budget.spent(time.perf_counter() - start - seconds, found)
        shared = {"case": case.name, **case._asdict(), "all_threads": case.threads in (0, report.num_cores())}
        shared |= {"repetition seconds": seconds, "engine": "", "gamma": "", "role": ""}
        record["rows"] += [shared | row for row in found]
        try:
            report.synchronize(device)
        except RuntimeError as error:  # a device that is lost stays lost
            record["stopped"] = one_line(error)
        record["seconds"] = round(60 * minutes - budget.left(), 1)
        write(result, record, device, redraw=i % 8 == 0)
    write(result, record, device, redraw=True)
    return record


def main(argv: list[str] | None = None, cases: list[Case] | None = None) -> None:
    parser = report.Parser("speed", "StableMask's speed beside plain causal attention's.")
    parser.add_argument("--minutes", type=float, help="time for everything (default 9 on a GPU, 15 on a CPU)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--only", choices=GROUPS, help="one group of cases")
    args = parser.parse(argv)
    device = torch.device(args.device) if args.device else report.pick_device()
    minutes = MINUTES[device.type] if args.minutes is None else args.minutes
    with parser.refusing():
        if not 0 < minutes <= 24 * 60:
            raise ValueError(f"--minutes must be above 0 and at most a day, got {minutes}")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device on this machine; leave it out, or pass cpu")
        result = report.Result(parser, args.out, "speed", device, peers=versions())
    torch.manual_seed(0)
    chosen = [case for case in (plan(device) if cases is None else cases) if args.only in (None, case.group)]
    record = run(chosen, device, minutes, result)
    verdicts = judge(record["rows"], device.type)
    print(targets_table(verdicts), f"wrote {result.stem}.md, .json and figures", sep="\n")
    print(json.dumps({"verdicts": [v._asdict() for v in verdicts], "dropped": record["dropped"]}))
