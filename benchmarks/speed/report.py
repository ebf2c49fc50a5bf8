"""The result files of benchmarks.speed: tables, targets and notes for people, a record for programs."""

from typing import Any

import torch

from benchmarks import report
from benchmarks.speed.figures import draw
from benchmarks.speed.growth import FIT
from benchmarks.speed.targets import BOTH, Verdict, judge
from benchmarks.speed.timing import MODES

Record = dict[str, Any]
NOTES = """
How it was measured: medians (p20 to p80) over rounds in which the variants of a case take turns, in reversed order every other
round, on inputs that rotate over more than twice the L2 cache; ratios are medians of ratios within a round. On a GPU times are
those between CUDA events behind a pause of the device, so the device's own; host ms is what launching both passes took
beside that. Clocks were left as they were. FLOP: 4 D for each visible pair and head forward (causal: S * S / 2 pairs), 2.5 times
that backward; the dense formula does twice the work that it is credited with. Forward is that of training, unless it says no
gradients. floor: the engine's bare op and the epilogue's own ops, without any library; beyond floor is (StableMask - floor) /
plain. log M of `out * sigmoid(lse - m)` was computed beforehand and is not counted. check: the largest difference from eq. 11 in
float64 in slices of out, dq, dk, dv, relative to the largest value. Peak: the most that a forward and a backward pass hold,
inputs included. On a CPU peak memory is measured in a pass of its own, and of attention in the memory case alone, since
following the allocator takes longer than the call.

Decode: a hot loop, the mean of its calls, median over loops; positions and masks are made before a loop begins.
"""
ABOUT_PEERS = """\
Of sm_flex milliseconds and peak memory; of peers multiples of sm_flex's with the same mass, medians (p20 to p80) over rounds in
which all take turns. learned sink: one per head, whose gradient is asked for and checked. sink 0: e^0 beside the scores,
softmax-off-by-one, where a peer has no other. What is wrong was found by the check against eq. 11 in float64, gradients included.
flash-attention-softmax-n makes a tensor on "cuda" when it is imported; without a GPU that tensor was made on the CPU. The float
mask of Transformers is made once for all layers and not counted."""
ABOUT_GROWTH = """\
StableMask's time less plain causal attention's, B 1, fitted by a + b S + c S^2 (a + b S where c is 0 within two errors).
bytes per row: b times the measured copy bandwidth, of one head; by count: what the epilogue's ops read and write, one after
the other, and at least: out once and lse once, each way. c of causal's: the S^2 term over causal attention's own, and its
standard error."""


def targets_table(verdicts: list[Verdict]) -> str:
    lines = [(v.text, f"{v.limit:g}", v.verdict, v.figure) for v in verdicts]
    return report.markdown_table(("target", "limit", "verdict", "figure"), lines)


def write(result: report.Result, record: Record, device: torch.device, redraw: bool) -> None:
    """The files as of now; the .png takes longer than the others."""
    verdicts = judge(record["rows"], device.type)
    rows = record["rows"]
    parts = ["## Targets", targets_table(verdicts)]
    for group, tables in (("peers", _peers), ("growth", _growth)):
        if any(row["group"] == group for row in rows):
            parts += tables([row for row in rows if row["group"] == group])
    parts += ["## Attention", *_attention_tables(rows), "## The parts", _parts_table(rows)]
    notes = [f"Copy bandwidth of the device, measured: {record['copy GB/s']:.0f} GB/s."]
    few = [row for row in record["rows"] if row["repetition seconds"] < record["repetition seconds"]]
    if few:
        notes.append(f"Repetitions cut to fit in {record['minutes']:g} minutes: {len({row['case'] for row in few})} cases.")
    if record["dropped"]:
        notes.append("Dropped, not measured: " + "; ".join(record["dropped"]) + ".")
    if "stopped" in record:
        notes.append(f"Stopped, the device failed: {record['stopped']}.")
    saved = {**record, "verdicts": [verdict._asdict() for verdict in verdicts]}
    figures = draw(rows, device.type) if redraw else {}
    if not redraw and result.path(".png").exists():
        figures = dict.fromkeys(suffix for suffix in ("", "-growth") if result.path(f"{suffix}.png").exists())
    result.write("Speed", "\n\n".join(parts), "\n\n".join(notes) + "\n" + NOTES, saved, figures)


def _attention_tables(rows: list[Record]) -> list[str]:
    columns = ("variant", "forward ms", "backward ms", "both ms", "host ms", "TFLOP/s", "against", "forward", "backward", "both")
    parts, cases = [], list(dict.fromkeys(row["case"] for row in rows if row["group"] in ("attention", "memory")))
    for case in cases:
        lines = []
        for row in (row for row in rows if row["case"] == case):
            tail = (_peak(row), f"{row['check']:.1e}" if "check" in row else "")
            if "ms" not in row:
                lines.append((row["variant"], *[""] * 10, *tail, row.get("error", "")))
                continue
            ms = [_spread(row["ms"][mode]) if mode in row["ms"] else "" for mode in MODES]
            host = "" if row["threads"] or "host" not in row["ms"] else f"{row['ms']['host']['median']:.2f}"
            head = (row["variant"], *ms, host, f"{row['tflops'].get(BOTH, row['tflops']['forward']):.3g}")
            tail = (f"{row['beyond floor']['median']:+.3f}" if "beyond floor" in row else "", *tail)
            if not row.get("ratio"):
                lines.append((*head, "", "", "", "", *tail, row.get("error", "")))
            for n, (against, by_mode) in enumerate(row.get("ratio", {}).items()):
                cells = [f"{by_mode[mode]['median']:.3f}" if mode in by_mode else "" for mode in MODES]
                lines.append((*(head if n == 0 else ("", *[""] * 5)), against, *cells, *(tail if n == 0 else ("", "", "")), ""))
        names = (*columns, "beyond floor", "peak MiB", "check", "error")
        used = [i for i in range(len(names)) if any(line[i] for line in lines)]
        parts += [f"### {case}", report.markdown_table([names[i] for i in used], [[line[i] for i in used] for line in lines])]
    return parts


def _peers(rows: list[Record]) -> list[str]:
    """Ours in milliseconds, then each peer over it."""
    rows = sorted(rows, key=lambda row: (row["dtype"], row["length"]))
    lines = []
    for row in rows:
        at = (row["length"], row["dtype"], row["batch"], row["variant"])
        peak = f"{row['peak_bytes'] / 2**20:.1f} MiB" if "peak_bytes" in row else ""
        said = "; ".join(
            [*row.get("wrong", []), *([row["why"]] if "why" in row else []), *([row["error"]] if "error" in row else [])]
        )
        if "ratio" in row:
            cells = [_spread(row["ratio"]["sm_flex"][mode]) if mode in row["ratio"]["sm_flex"] else "" for mode in MODES]
            lines.append((*at, row["against"].removeprefix("sm_flex, "), *cells, f"{row['peak_ratio']:.2f} ({peak})", said))
        elif "ms" in row:
            cells = [_spread(row["ms"][mode]) + " ms" if mode in row["ms"] else "" for mode in MODES]
            lines.append((*at, "", *cells, peak, said))
        else:
            lines.append((*at, row.get("mass", ""), "", "", "", peak, said))
    columns = (
        "S",
        "dtype",
        "B",
        "attention",
        "against sm_flex with",
        "forward",
        "backward",
        "both",
        "memory",
        "what it gets wrong",
    )
    shape = rows[0]
    about = f"{shape['heads']}:{shape['kv_heads']} heads, D {shape['head_dim']}. {ABOUT_PEERS}"
    return ["## Peers", about, report.markdown_table(columns, lines)]


def _growth(rows: list[Record]) -> list[str]:
    """The extra at each S, and its fit."""
    lines, fits = [], []
    for row in rows:
        series = (row["dtype"], row["heads"])
        if "values" in row:
            values = row["values"]
            error = f"{values['b ns']:.3g} ± {values['b error']:.2g}"
            fits.append((*series, row["mode"], error, *(f"{values[key]:.3g}" for key in FIT[2:])))
            continue
        cells = [
            _spread(row[key][mode]) if mode in row.get(key, {}) else ""
            for mode in (MODES[0], BOTH)
            for key in ("plain ms", "extra ms")
        ]
        lines.append((row["length"], *series, *cells, row.get("why", row.get("error", ""))))
    columns = ("S", "dtype", "heads", "causal, forward ms", "extra", "causal, both ms", "extra", "")
    fitted = report.markdown_table(("dtype", "heads", "mode", "b, ns a row", *FIT[2:]), fits)
    return ["## Growth", ABOUT_GROWTH, fitted, report.markdown_table(columns, lines)]


def _parts_table(rows: list[Record]) -> str:
    lines = []
    for row in (row for row in rows if row["group"] in ("epilogue", "decode", "first call")):
        ms = row["ms"]["forward"] if "ms" in row else None
        over = row["ratio"]["same engine"]["forward"]["median"] if "ratio" in row else None
        values = ", ".join(f"{key} {value:.4g}" for key, value in row.get("values", {}).items())
        cells = ("" if ms is None else _spread(ms, 4), "" if over is None else f"{over:.3f}", values)
        lines.append((row["case"], row["variant"], *cells, f"{row['check']:.1e}" if "check" in row else "", row.get("error", "")))
    return report.markdown_table(("case", "what", "ms", "StableMask / plain", "figures", "check", "error"), lines)


def _spread(found: dict[str, float], digits: int = 3) -> str:
    return f"{found['median']:.{digits}g} ({found['p20']:.{digits}g} to {found['p80']:.{digits}g})"


def _peak(row: Record) -> str:
    if "peak_bytes" not in row:
        return ""
    over = f" ({row['peak_ratio']:.3f})" if "peak_ratio" in row else ""
    return f"{row['peak_bytes'] / 2**20:.1f}{over}"
