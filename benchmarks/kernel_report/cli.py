"""What the compiler makes of the remask kernel, ahead of time, for three GPU generations, without a GPU.

    python -m benchmarks.kernel_report

Each variant is compiled to a cubin as a launch with contiguous tensors would specialise it, with the launch's
own options; registers, spills and instructions come from the cubin itself. A spill fails the run, and so does
a variant with more instructions than its budget (roof.py), or one that would move out in narrow pieces.
"""

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.kernel_report import roof
from benchmarks.kernel_report.cubin import SOURCES, TYPES, Cubin, Variant, compile_variant

TARGETS = tuple(roof.MACHINES)
HEAD_DIMS = (64, 128, 256)
COLUMNS = (
    "target", "dtype", "head_dim", "out", "log M from", "rows", "registers", "spilled", "widest load", "widest store",
    "instructions", "to EXIT", "per 32 rows", "budget", "skipped per 32 rows", "budget", "warps in flight", "issue bound, TB/s",
)  # fmt: skip


def variants() -> list[Variant]:
    """In place from arange for every dtype and head_dim; at 128 from every source, and into a new buffer."""
    found = []
    for arch in TARGETS:
        for dtype in TYPES:
            found += [Variant(arch, dtype, head_dim, True, "arange") for head_dim in HEAD_DIMS]
            found += [Variant(arch, dtype, 128, True, source) for source in SOURCES if source != "arange"]
            found += [Variant(arch, dtype, head_dim, False, "arange") for head_dim in HEAD_DIMS]
            found += [Variant(arch, dtype, 128, False, "table")]
    return found


def value_variants() -> list[Variant]:
    """With a sink that carries a value: log M is then a table."""
    return [
        Variant(arch, dtype, head_dim, in_place, "table", has_value=True)
        for arch in TARGETS for dtype in TYPES for in_place in (True, False) for head_dim in HEAD_DIMS
    ]  # fmt: skip


def fault(variant: Variant, cubin: Cubin) -> str | None:
    """What is wrong with a variant, if anything."""
    if cubin.spilled:
        return "spills"
    if roof.over_budget(variant, cubin):
        return "over budget"
    return "narrow" if min(cubin.load, cubin.store) < 128 else None


def row_of(variant: Variant, cubin: Cubin) -> tuple[object, ...]:
    touched, skipped = roof.per_32_rows(variant, cubin)
    most, most_skipped = roof.budget(variant)
    where = "in place" if variant.in_place else "new buffer"
    named = (f"sm_{variant.arch}", str(variant.dtype)[6:], variant.head_dim, where, variant.source, variant.rows)
    skips = (cubin.skipped, touched, most, skipped, most_skipped) if variant.in_place else ("-", touched, most, "-", "-")
    bound = f"{roof.issue_bound(variant, cubin) / 1e12:.1f}"
    flight = roof.warps_in_flight(variant.arch, cubin)
    return (*named, cubin.registers, cubin.spilled, cubin.load, cubin.store, cubin.instructions, *skips, flight, bound)


def paper(variant: Variant, cubin: Cubin) -> tuple[str, list[tuple[str, float, float, bool]]]:
    """The arithmetic of one GPU: its times as a table, and its verdicts on the targets."""
    gammas = ("value",) if variant.has_value else ("zero", "headwise")
    estimates = [roof.estimate(length, gamma, variant, cubin) for length in roof.LENGTHS for gamma in gammas]
    columns = ("S", "gamma", "tiles touched", "MB", "bytes, us", "instructions, us", "attention, us", "epilogue / attention")
    rows = [
        (at.length, at.gamma, f"{at.touched:.3f}", f"{at.megabytes:.0f}", f"{at.bytes_us:.1f}", f"{at.issue_us:.1f}",
         f"{at.attention_us:.0f}", f"{at.us / at.attention_us:.2%}")
        for at in estimates
    ]  # fmt: skip
    return report.markdown_table(columns, rows), (roof.judge_value if variant.has_value else roof.judge)(estimates)


def verdict_table(verdicts: list[tuple[str, float, float, bool]]) -> str:
    rows = [(text, limit, f"{figure:.3f}", "met" if good else "**missed**") for text, limit, figure, good in verdicts]
    return report.markdown_table(("target", "limit", "on paper", "verdict"), rows)


def main(argv: list[str] | None = None) -> int:
    parser = report.Parser("kernel_report", "What the compiler makes of the kernel.")
    args = parser.parse(argv)
    with parser.refusing():
        result = report.Result(parser, args.out, "kernel_report", torch.device("cpu"))
    chosen = [*variants(), *value_variants()]
    compiled = {variant: compile_variant(variant) for variant in tqdm(chosen, unit="variant", dynamic_ncols=True)}
    faults = [(variant, why) for variant, cubin in compiled.items() if (why := fault(variant, cubin))]
    rows, value_rows = [
        [row_of(variant, cubin) for variant, cubin in compiled.items() if variant.has_value == has_value]
        for has_value in (False, True)
    ]
    measured = Variant(90, torch.bfloat16, roof.HEAD_DIM, True, "arange")
    with_value = measured._replace(source="table", has_value=True)
    times, verdicts = paper(measured, compiled[measured])
    value_times, value_verdicts = paper(with_value, compiled[with_value])
    tables = "\n\n".join([
        report.markdown_table(COLUMNS, rows),
        "## The targets of benchmarks.speed, on paper",
        times,
        verdict_table(verdicts),
        "## A sink that carries a value",
        "out' = s out + p v. A tile is skipped only where p is 0 in float32 too, so that in practice every tile is touched.",
        report.markdown_table(COLUMNS, value_rows),
        value_times,
        verdict_table(value_verdicts),
    ])  # fmt: skip
    missed = [text for text, _, _, good in [*verdicts, *value_verdicts] if not good]
    said = "No variant spills, every one is within its budget." if not faults else f"At fault: {faults}."
    machine, machines = roof.MACHINES[90], [f"sm_{arch} a {at.name}" for arch, at in roof.MACHINES.items()]
    notes = (
        f"{said} Registers are per thread, spilled is bytes of stack and local memory per thread, loads and stores are bits per "
        "thread in one instruction. instructions are a warp's that touches its tile (a loop counts once), to EXIT those of "
        "one that skips it. Into a new buffer no tile is skipped. issue bound: the memory traffic of touched tiles whose "
        f"instructions fill every issue slot of the GPU, where {', '.join(machines)}. Compiled ahead of time, as for a launch "
        "with contiguous tensors and with its options; nothing was run.\n\n"
        f"On paper: one epilogue in place, bf16, {roof.TOKENS} tokens, {roof.HEADS} heads, head_dim {roof.HEAD_DIM}, on a "
        f"{machine.name} with {machine.multiprocessors} multiprocessors at {machine.clock / 1e9} GHz, of whose issue slots "
        f"{roof.ISSUED:.0%} are used, a copy at {machine.copy / 1e12} TB/s, and attention, forward and backward, at "
        f"{roof.FLOPS / 1e12:.0f} TFLOP/s. Bytes and instructions overlap, so the longer of the two is the time. Scores are "
        "standard normal. Launches, and the rest of a step, are not in it: these figures say what the kernel's own work "
        "allows, and only a GPU what it takes."
    )
    record = {
        "columns": COLUMNS, "rows": rows, "faults": [str(x) for x in faults], "targets": verdicts,
        "rows with a value": value_rows, "targets with a value": value_verdicts,
    }  # fmt: skip
    summary = {"faults": len(faults), "targets missed on paper": len(missed)}
    result.publish("What the compiler makes of the remask kernel", tables, notes, record, summary=summary)
    return 1 if faults or missed else 0
