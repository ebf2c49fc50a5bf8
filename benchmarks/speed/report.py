"""The result files of benchmarks.speed: tables, targets and notes for people, a record for programs."""

from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import plot, report
from benchmarks.speed.targets import BOTH, Verdict, judge
from benchmarks.speed.timing import MODES

Record = dict[str, Any]
NOTES = """
How it was measured: medians (p20 to p80) over rounds in which the variants of a case take turns, in reversed order every other
round, on inputs that rotate over more than twice the L2 cache; ratios are medians of ratios within a round. On a GPU times are
those between CUDA events behind a pause of the device, so the device's own; host ms is what launching both passes took
beside that. Clocks were left as they were. FLOP: 4 D for each visible pair and head forward (causal: S * S / 2 pairs), 2.5 times
that backward; the dense formula does twice the work that it is credited with. Forward is that of training. log M of `out *
sigmoid(lse - m)` was computed beforehand and is not counted. check: the largest difference from eq. 11 in float64 in slices of
out, dq, dk, dv, relative to the largest value. Peak: the most that a forward and a backward pass hold, inputs included.
On a CPU peak memory is measured in the memory case alone, since following the allocator takes longer than the call.
"""


def targets_table(verdicts: list[Verdict]) -> str:
    lines = [(v.text, f"{v.limit:g}", v.verdict, v.figure) for v in verdicts]
    return report.markdown_table(("target", "limit", "verdict", "figure"), lines)


def write(result: report.Result, record: Record, device: torch.device, redraw: bool) -> None:
    """The files as of now; the .png takes longer than the others."""
    verdicts = judge(record["rows"], device.type)
    parts = ["## Attention", *_attention_tables(record["rows"]), "## The parts", _parts_table(record["rows"])]
    parts += ["## Targets", targets_table(verdicts)]
    notes = [f"Copy bandwidth of the device, measured: {record['copy GB/s']:.0f} GB/s."]
    few = [row for row in record["rows"] if row["repetition seconds"] < record["repetition seconds"]]
    if few:
        notes.append(f"Repetitions cut to fit in {record['minutes']:g} minutes: {len({row['case'] for row in few})} cases.")
    if record["dropped"]:
        notes.append("Dropped, not measured: " + "; ".join(record["dropped"]) + ".")
    if "stopped" in record:
        notes.append(f"Stopped, the device failed: {record['stopped']}.")
    saved = {**record, "verdicts": [verdict._asdict() for verdict in verdicts]}
    figures = {"": draw(record["rows"]) if redraw else None}
    result.write("Speed", "\n\n".join(parts), "\n\n".join(notes) + "\n" + NOTES, saved, figures)


def _attention_tables(rows: list[Record]) -> list[str]:
    columns = ("variant", "forward ms", "backward ms", "both ms", "host ms", "TFLOP/s", "against", "forward", "backward", "both")
    parts, cases = [], list(dict.fromkeys(row["case"] for row in rows if row["group"] in ("attention", "memory")))
    for case in cases:
        lines = []
        for row in (row for row in rows if row["case"] == case):
            tail = (_peak(row), f"{row['check']:.1e}" if "check" in row else "")
            if "ms" not in row:
                lines.append((row["variant"], *[""] * 9, *tail, row.get("error", "")))
                continue
            ms = [_spread(row["ms"][mode]) for mode in MODES]
            host = "" if row["threads"] else f"{row['ms']['host']['median']:.2f}"
            head = (row["variant"], *ms, host, f"{row['tflops'][BOTH]:.3g}")
            if not row.get("ratio"):
                lines.append((*head, "", "", "", "", *tail, row.get("error", "")))
            for n, (against, by_mode) in enumerate(row.get("ratio", {}).items()):
                cells = [f"{by_mode[mode]['median']:.3f}" for mode in MODES]
                lines.append((*(head if n == 0 else ("", *[""] * 5)), against, *cells, *(tail if n == 0 else ("", "")), ""))
        parts += [f"### {case}", report.markdown_table((*columns, "peak MiB", "check", "error"), lines)]
    return parts


def _parts_table(rows: list[Record]) -> str:
    lines = []
    for row in (row for row in rows if row["group"] not in ("attention", "memory")):
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


def draw(rows: list[Record]) -> Figure:
    """Ratio of StableMask to plain on the same engine against S; each line one engine, dtype, head layout."""
    figure = plot.figure(11, 4)
    lines: dict[str, list[Record]] = {}
    for row in sorted(rows, key=lambda row: row["length"]):
        if row["group"] == "attention" and row["kind"] == "causal" and "same engine" in row.get("ratio", {}):
            threads = f", {row['threads']} thr" if row["threads"] else ""
            label = f"{row['variant'].replace(', StableMask', '')}, {row['dtype']}, D {row['head_dim']}, "
            lines.setdefault(f"{label}{row['heads']}:{row['kv_heads']}{threads}", []).append(row)
    lengths = sorted({row["length"] for found in lines.values() for row in found}) or [1]
    panels = figure.subplots(1, 3, sharey=True)
    for mode, axes in zip(MODES, panels, strict=True):
        axes.axhline(1, color="gray", linewidth=0.8)
        for label, found in lines.items():
            ratios = [row["ratio"]["same engine"][mode]["median"] for row in found]
            dash = "--" if "gamma 0" in label else "-"
            axes.plot([row["length"] for row in found], ratios, dash, marker="o", markersize=3, label=label)
        plot.log_axis(axes, lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axes.set(title=mode, xlabel="S (constant tokens)")
    panels[0].set_ylabel("StableMask / plain, same engine")
    if lines:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=6)
    return figure
