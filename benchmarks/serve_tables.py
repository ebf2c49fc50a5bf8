"""What benchmarks/serve.py measured, as tables and as ratios."""

import statistics
from typing import Any

from benchmarks import report

CAUSAL, STABLEMASK = VARIANTS = ("causal", "StableMask")


def tables(record: dict[str, Any]) -> str:
    decode = [[row["batch"], row["context"], *cells(row)] for row in record["decode"]]
    prefill = [[row["prompt"], row["chunk"] or "whole", *cells(row)] for row in record["prefill"]]
    columns = [*(f"{name}, ms" for name in VARIANTS), "ratio"]
    load_columns = ["attention", "tokens/s", "first token", "each further token", "whole request"]
    found = [
        "Decode, one step",
        report.markdown_table(["batch", "context", *columns], decode),
        "Prefill, one prompt",
        report.markdown_table(["tokens", "chunk", *columns], prefill),
        "Served load: median and 95th percentile of the requests, in ms",
        report.markdown_table(load_columns, load_rows(record["load"])),
    ]
    return "\n\n".join(found)


def cells(row: dict[str, Any]) -> list[str]:
    found = []
    for name in VARIANTS:
        ms = report.median_and_fifths(row[name])
        found.append(f"{ms['median']:.2f} ({ms['p20']:.2f} to {ms['p80']:.2f})")
    return [*found, f"{ratio(row):.3f}"]


def ratio(row: dict[str, Any]) -> float:
    return statistics.median(row[STABLEMASK]) / statistics.median(row[CAUSAL])


def load_rows(runs: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for name in VARIANTS:
        of_it = [run for run in runs if run["attention"] == name]
        speed = report.mean_and_range([run["tokens a second"] for run in of_it], ".1f")
        times = [[x for run in of_it for x in run[what]] for what in ("first", "each", "whole")]
        rows.append([name, speed, *(f"{statistics.median(x):.1f}, {percentile_95(x):.1f}" for x in times)])
    return rows


def percentile_95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1] if len(values) > 1 else values[0]


def summary(record: dict[str, Any]) -> dict[str, Any]:
    parts = ("decode", "prefill")
    rows = [
        {**{k: v for k, v in row.items() if k not in VARIANTS}, "ratio": round(ratio(row), 3)}
        for part in parts
        for row in record[part]
    ]
    return {"ratios": rows}
