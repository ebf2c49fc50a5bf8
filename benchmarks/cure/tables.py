"""The tables of benchmarks.cure's result file."""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import report
from benchmarks.cure.measures import paired
from benchmarks.cure.quantise import ROUNDINGS
from benchmarks.cure.record import mean, of_shared_orders

# What the first trial found of the window's loss, smallest first.
EXPECTED = ("evicted-mass", "mass", ("evicted-headwise", "evicted"), "headwise", "causal")


def tables(record: dict[str, Any]) -> str:
    found = [_illness(record), _untrained(record), _trained(record, "main"), _where(record, "main"), _order(record)]
    found += [_trained(record, "slot0"), _where(record, "slot0"), _long(record), _stream(record), _rounded(record)]
    found.append(_along_the_way(record))
    return "\n\n".join(part for part in found if part)


def _table(title: str, text: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return f"## {title}\n\n{text}\n\n{report.markdown_table(columns, rows)}" if rows else ""


def _difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> str:
    if not ours:
        return ""
    value, error = paired(ours, theirs)
    return f"{value:+.4f} ({error:.4f})"


def _ppl(per_order: Sequence[Sequence[float]]) -> str:
    return f"{math.exp(mean(per_order)):.1f}"


def _illness(record: dict[str, Any]) -> str:
    base = record["untrained"].get("causal")
    if base is None:
        return ""
    whole, losses = base["whole"], base["losses"]
    late = {view: math.exp(statistics.fmean(losses[view]["late"])) for view in losses}
    levels = sorted(x for layer in record["sinks"]["level"][len(record["sinks"]["level"]) * 2 // 5 :] for x in layer)
    low, middle, high = (levels[int(q * (len(levels) - 1))] for q in (0.1, 0.5, 0.9))
    return (
        "## The illness\n\n"
        f"Before any training the first token gets {whole['share']:.3f} of all attention from rows after the first quarter, "
        f"{whole['share_late_layers']:.3f} in the last three fifths of the layers. Its hidden state reaches a norm of "
        f"{whole['norm_first']:,.0f}; the largest of any other slot is {whole['norm_other'][1]:,.0f}, the median "
        f"{whole['norm_median']:,.0f}. No other column gets more than {whole['largest_column'][1]:.3f}. Perplexity of the "
        f"second half of the rows: {late['whole']:.1f} with all keys, {late['window']:.1f} in a window of "
        f"{record['config']['window']}, {late['window+4']:.1f} in one that keeps the first four, {late['evicted']:.1f} with all "
        f"keys but the first, from row 8 on. Level of the sinks (log mass) in those layers: {low:.1f} at 10 %, {middle:.1f} at "
        f"the median, {high:.1f} at 90 %."
    )


def _untrained(record: dict[str, Any]) -> str:
    base, rows = record["untrained"].get("causal"), []
    for x in record["untrained"].values():
        late, looks = {view: [v["late"]] for view, v in x["losses"].items()}, x["whole"]
        rows.append((
            x["label"], f"{statistics.fmean(x['losses']['whole']['all']):.4f}",
            _difference([x["losses"]["whole"]["all"]], [base["losses"]["whole"]["all"]]) if base else "",
            _difference([x["losses"]["evicted"]["all"]], [base["losses"]["whole"]["all"]]) if base else "",
            _ppl(late["window"]), _ppl(late["window+4"]), _difference(late["window"], [base["losses"]["window+4"]["late"]]),
            f"{looks['share']:.3f}", f"{statistics.fmean(looks['pseudo_by_layer']):.3f}",
        ))  # fmt: skip
    columns = (
        "switched on, no training", "whole (nats)", "minus causal", "first token gone from row 8, minus causal's whole",
        "window (ppl)", "window + 4 kept (ppl)", "window, minus causal's window + 4 (nats)", "share of the first token",
        "share of no token",
    )  # fmt: skip
    text = "Perplexities are of the second half of the rows. In brackets: standard error of the paired difference over the rows."
    return _table("The switch", text, columns, rows)


def _trained(record: dict[str, Any], kind: str) -> str:
    variants = {key: x for key, x in record["variants"].items() if _usual(record, x)}
    control, rows = variants.get("causal"), []
    for key, x in variants.items():
        if x["kind"] != kind and not (kind == "slot0" and key in ("causal", "evicted-mass", "evicted-value")):
            continue
        rows.append(_row_of(x, control))
    text = (
        f"{record['config']['steps']} steps of one row of {record['config']['length']} tokens. Own view: as it was trained. "
        "Mean over the orders of the rows; differences are of the same orders, and in brackets stands the standard error over "
        "the held-out rows."
    )
    title = {"main": "The cure", "slot0": "The first token's own activation: what removes it (one order)"}[kind]
    if kind == "slot0" and not any(x["kind"] == kind for x in variants.values()):
        return ""
    return _table(title, text, _COLUMNS, rows)


_COLUMNS = (
    "fine-tuned", "orders", "own view (nats)", "minus causal's whole", "whole (nats)", "first token gone from row 8 (nats)",
    "window (ppl)", "window + 4 kept (ppl)", "window, minus causal's window + 4 (nats)",
)  # fmt: skip


def _row_of(x: dict[str, Any], control: dict[str, Any] | None) -> tuple[object, ...]:
    losses = x["losses"]
    own, window = "", ""
    if control is not None:
        own = _difference(*of_shared_orders(x, control, "own", "whole", "all"))
        window = _difference(*of_shared_orders(x, control, "window", "window+4", "late"))
    return (
        x["label"], len(x["orders"]), f"{mean(losses['own']['all']):.4f}", own, f"{mean(losses['whole']['all']):.4f}",
        f"{mean(losses['evicted']['all']):.4f}", _ppl(losses["window"]["late"]), _ppl(losses["window+4"]["late"]), window,
    )  # fmt: skip


def _usual(record: dict[str, Any], x: dict[str, Any]) -> bool:
    return x["steps"] == record["config"]["steps"]


def _where(record: dict[str, Any], kind: str) -> str:
    base, rows = record["untrained"].get("causal"), []
    if base is not None:
        rows.append(_where_row("untrained", [base["own"]], [base["whole"]]))
    for x in record["variants"].values():
        if x["kind"] == kind and (_usual(record, x) or kind == "main"):
            label = x["label"] if _usual(record, x) else f"{x['label']}, {x['steps']} steps"
            rows.append(_where_row(label, x["own"], x["whole"]))
    text = (
        "Each order by itself. Columns: mean of the rows of the second half and of the heads in the last three fifths of the "
        "layers, with the slot. Norms: largest of all layers, median over the rows that were looked at."
    )
    columns = (
        "", "share of the first token, own view", "... whole", "largest other column, own view (slot)",
        "norm of the first token, own view", "largest other norm, own view (slot)",
    )  # fmt: skip
    return _table("Where attention went" + (", and the first token" if kind == "slot0" else ""), text, columns, rows)


def _where_row(label: str, own: Sequence[dict[str, Any]], whole: Sequence[dict[str, Any]]) -> tuple[object, ...]:
    def each(form: Any, looks: Sequence[dict[str, Any]]) -> str:
        return " / ".join(form(x) for x in looks)

    return (
        label, each(lambda x: f"{x['share_late_layers']:.3f}", own), each(lambda x: f"{x['share_late_layers']:.3f}", whole),
        each(lambda x: f"{x['largest_column'][1]:.3f} ({x['largest_column'][0]})", own),
        each(lambda x: f"{x['norm_first']:,.0f}", own),
        each(lambda x: f"{x['norm_other'][1]:,.0f} ({x['norm_other'][0]})", own),
    )  # fmt: skip


def _order(record: dict[str, Any]) -> str:
    variants = {key: x for key, x in record["variants"].items() if _usual(record, x)}
    rows = []
    for better, worse in itertools.pairwise(EXPECTED):
        for first in (better,) if isinstance(better, str) else better:
            for second in (worse,) if isinstance(worse, str) else worse:
                if first in variants and second in variants:
                    ours, theirs = of_shared_orders(variants[second], variants[first], "window", "window", "late")
                    signs = ", ".join(
                        f"{statistics.fmean(a) - statistics.fmean(b):+.3f}" for a, b in zip(ours, theirs, strict=True)
                    )
                    labels = variants[second]["label"], variants[first]["label"]
                    rows.append((f"{labels[0]} minus {labels[1]}", _difference(ours, theirs), signs))
    text = "The trial expected each of these to be above 0. Loss of the second half in the window, nats."
    return _table("The expected order", text, ("", "mean (s.e.)", "each order"), rows)


def _long(record: dict[str, Any]) -> str:
    long = {key: x for key, x in record["variants"].items() if not _usual(record, x)}
    control = next((x for key, x in long.items() if key.startswith("causal-")), None)
    rows = [_row_of(x, control) for x in long.values()]
    steps = sorted({x["steps"] for x in long.values()})
    text = f"{' and '.join(map(str, steps))} steps, one order; the causal control had as many."
    return _table("Longer", text, _COLUMNS, rows)


def _stream(record: dict[str, Any]) -> str:
    rows, kept = [], record["stream"].get("causal+4")
    for x in record["stream"].values():
        half = len(x["nats"][0]) // 2
        late = [statistics.fmean(row[half:]) for row in x["nats"]]
        theirs = kept and [statistics.fmean(row[half:]) for row in kept["nats"]]
        minus = _difference([late], [theirs]) if theirs else ""
        rows.append((x["label"], f"{math.exp(statistics.fmean(late)):.1f}", f"{statistics.fmean(late):.4f}", minus))
    config = record["config"]
    text = (
        f"{config['long_rows']} held-out rows of {config['long_length']:,} tokens through a window of {config['window']}, second "
        "half. Order 0."
    )
    return _table("Streaming", text, ("", "perplexity", "nats", "minus causal fine-tuned with 4 kept"), rows)


def _rounded(record: dict[str, Any]) -> str:
    rows = []
    for x in record["rounded"].values():
        plain = x["nats"]["float32"]
        cells = [_difference([x["nats"][name]], [plain]) for name in ROUNDINGS]
        rows.append((x["label"], f"{math.exp(statistics.fmean(plain)):.2f}", *cells))
    text = "Perplexity in float32, and by how many nats each rounding raises the loss of the same rows, own view. Order 0."
    return _table("Rounded to int8", text, ("", "float32 (ppl)", *ROUNDINGS), rows)


def _along_the_way(record: dict[str, Any]) -> str:
    """A row's loss is computed before the step that learns it, and all variants see the same rows: a paired test of its own."""
    control, rows = record["training"].get("causal"), []
    for x in record["training"].values():
        third = max(1, x["steps"] // 3)
        cells = ["", "", ""]
        if control is not None and x["steps"] == control["steps"]:
            shared = [order for order in x["orders"] if order in control["orders"]]
            ours, theirs = ([y["nats"][y["orders"].index(order)] for order in shared] for y in (x, control))
            parts = (slice(0, 1), slice(0, third), slice(-third, None))
            cells = [_difference([a[part] for a in ours], [b[part] for b in theirs]) for part in parts]
            cells[0] = cells[0].partition(" ")[0]  # one row has no standard error
        label = x["label"] if _usual(record, x) else f"{x['label']}, {x['steps']} steps"
        peak = max(max(norms) for norms in x["gradients"])
        rows.append((label, len(x["orders"]), *cells, f"{peak:,.0f}"))
    text = (
        "Loss of each step's row before it is learned, own view, minus causal's of the same row (standard error over the rows); "
        "the largest norm of a gradient."
    )
    columns = ("", "orders", "first row", "first third of the steps", "last third", "gradient")
    return _table("Along the way", text, columns, rows)
