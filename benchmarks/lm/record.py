"""The record of benchmarks.lm: everything measured, for programs and for figures.py; and tables for people.

record["variants"][name], in the order in which they were trained. A list per seed is in the order of its
seeds.

    loss, perplexity    on the validation rows, nats per byte, e^(nats per token): {mean, min, max, values: per seed}
    difference          loss minus causal's of the same seed, in that form; absent for causal, or without it
    curve               {steps, loss: [per step] per seed}
    first_token_share   {positions, by_layer: [per position] per layer}, mean over heads, texts, seeds; or None
    pseudo_share        likewise: what no token of the text gets
    extrapolation       {times, kept: {"0": {"perplexity": [per time] per seed}}}; None without long texts
    tokens_per_s        of the median step; peak_memory_mib: None where it is not known
    maps                causal and stablemask, seed 0: [{layer, head, tokens, rows}]; else absent
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.lm.measures import share_positions
from benchmarks.lm.presets import parameters
from benchmarks.lm.train import TrainingRun

Measured = list[tuple[TrainingRun, dict[str, Any]]]


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    known = [x for x in values if x is not None]
    if not known:
        return None
    return {"mean": statistics.fmean(known), "min": min(known), "max": max(known), "values": known}


def record_of(measured: Measured, preset: str) -> dict[str, Any]:
    """Of runs that are done, and what measures.measure() says of each."""
    first = measured[0][0]
    corpus, size = first.corpus, first.size
    measured = sorted(measured, key=lambda pair: pair[0].seed)
    causal = {run.seed: run.validation[-1][1] for run, _ in measured if run.variant.name == "causal"}
    names = dict.fromkeys(run.variant.name for run, _ in measured)
    variants = {name: _variant([pair for pair in measured if pair[0].variant.name == name], causal) for name in names}
    config = {
        "preset": preset, **asdict(size), "position": first.position, "seeds": sorted({run.seed for run, _ in measured}),
        "window": size.length, "text": corpus.name, "tokens": corpus.fingerprint,
        "parameters": parameters(size),
        "training_documents": corpus.documents[0], "training_bytes": corpus.text_bytes[0],
        "training_tokens": len(corpus.training), "validation_documents": corpus.documents[1],
        "validation_bytes": corpus.text_bytes[1], "validation_tokens": len(corpus.validation),
        "tokens_seen": size.steps * size.rows * size.length, "trained_at": sorted({run.commit for run, _ in measured}),
    }  # fmt: skip
    return {"config": config, "variants": variants}


def _variant(measured: Measured, causal: dict[int, float]) -> dict[str, Any]:
    runs, found = [run for run, _ in measured], [x for _, x in measured]
    losses = {run.seed: run.validation[-1][1] for run in runs}
    curves = [[nats for _, nats, _ in run.validation] for run in runs]
    result: dict[str, Any] = {
        "label": runs[0].variant.label,
        "seeds": list(losses),
        "loss": spread(list(losses.values())),
        "perplexity": spread([math.exp(run.validation[-1][2]) for run in runs]),
        "curve": {"steps": [step for step, _, _ in runs[0].validation], "loss": curves},
        "tokens_per_s": spread([run.tokens_per_s for run in runs]),
        "peak_memory_mib": spread([run.peak_mib for run in runs]),
    }
    if runs[0].variant.name != "causal" and causal.keys() & losses.keys():
        result["difference"] = spread([losses[seed] - causal[seed] for seed in losses if seed in causal])
    for key in ("first_token_share", "pseudo_share"):
        known = found[0][key] is not None
        by_layer = np.mean([x[key] for x in found], axis=0).tolist() if known else None
        result[key] = {"positions": share_positions(runs[0].size.length), "by_layer": by_layer} if known else None
    longer = [x["extrapolation"] for x in found]
    result["extrapolation"] = longer[0] and {
        "times": longer[0]["times"],
        "texts": longer[0]["texts"],
        "kept": {kept: {"perplexity": [x["kept"][kept] for x in longer]} for kept in longer[0]["kept"]},
    }
    maps = next((x["maps"] for x in found if x["maps"]), None)
    return {**result, "maps": maps} if maps else result


def tables(record: dict[str, Any]) -> str:
    """Loss; where attention goes; longer texts; speed."""
    variants = record["variants"].values()
    parts = [_loss_table(variants)]
    if all(v["first_token_share"] for v in variants):
        parts.append(_share_table(variants, record["config"]["length"]))
    if all(v["extrapolation"] for v in variants):
        parts.append(_longer_table(variants))
    rows = [(v["label"], _mean(v["tokens_per_s"], ",.0f"), _mean(v["peak_memory_mib"], ",.0f")) for v in variants]
    what = "Training speed in the median step, and most memory (on a CPU the whole process's, libraries included):"
    parts.append(_table(what, ("tokens/s (median step)", "peak memory (MiB)"), rows))
    return "\n\n".join(parts)


def _table(what: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return f"{what}\n\n{report.markdown_table(('', *columns), rows)}"


def _loss_table(variants: Any) -> str:
    rows = []
    for v in variants:
        difference = v.get("difference")
        higher = f", higher with {sum(x > 0 for x in difference['values'])} of {len(difference['values'])}" if difference else ""
        cells = (_mean(v["loss"], ".4f"), _mean(difference, "+.4f") + higher, _mean(v["perplexity"], ".2f"))
        rows.append((v["label"], len(v["seeds"]), *cells))
    columns = ("seeds", "loss (nats per byte)", "minus causal, same seed", "perplexity (per token)")
    return _table("Validation loss, mean (smallest to largest of the seeds):", columns, rows)


def _share_table(variants: Any, length: int) -> str:
    positions = share_positions(length)
    shown = [p for p in (4, 16, 64, length - 1) if p in positions]
    keys = {"first_token_share": "first token", "pseudo_share": "no token"}
    rows = []
    for v in variants:
        means = [np.mean(v[key]["by_layer"], axis=0) for key in keys]
        rows.append((v["label"], *(f"{mean[positions.index(p)]:.3f}" for mean in means for p in shown)))
    what = (
        "Attention to the first token of the text, and to no token of it (the mass, or the artificial token), from a query that "
        "has so many tokens before it; mean over layers, heads, texts and seeds:"
    )
    return _table(what, [f"{key}, after {p}" for key in keys.values() for p in shown], rows)


def _longer_table(variants: Any) -> str:
    rows, times = [], next(iter(variants))["extrapolation"]["times"]
    for v in variants:
        for kept, found in v["extrapolation"]["kept"].items():
            name = v["label"] + (f", first {kept} kept" if kept != "0" else "")
            by_time = zip(*found["perplexity"], strict=True)
            rows.append((name, *(report.mean_and_range(values, ".2f") for values in by_time)))
    what = (
        "Perplexity of the tokens between half and all of so many times the training length, by window attention over the most "
        "recent keys, as many as the training length:"
    )
    return _table(what, [f"{x}x" for x in times], rows)


def _mean(x: dict[str, Any] | None, form: str) -> str:
    return "" if x is None else report.mean_and_range(x["values"], form)


def notes(record: dict[str, Any]) -> str:
    config = record["config"]
    seeds = len(config["seeds"])
    fewer = [v["label"] for v in record["variants"].values() if len(v["seeds"]) < seeds]
    several = f"{seeds} seeds" if seeds > 1 else "One seed: a difference of a few hundredths of a nat is noise"
    if fewer:
        several += f"; fewer for {', '.join(fewer)}"
    return (
        f"{several}. Variants with one seed had the same first weights and "
        f"the same batches in the same order. Trained at commit {', '.join(config['trained_at'])}.\n\n{report.listed(config)}"
    )
