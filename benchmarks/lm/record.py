"""The record of a run of benchmarks.lm: everything measured, for programs and for figures.py; and the table for people.

record["variants"][name], in the order of lm_variants.ALL. Every list "one a seed" is in the order of its seeds.

    loss, perplexity        on the validation rows: nats a byte, and e^(nats a token); {mean, min, max, values: one a seed}
    difference              loss minus causal's of the same seed, in that form; absent for causal, or without it
    curve                   {steps, loss: [one a step] a seed}
    first_token_share       {positions, by_layer: [one a position] a layer}, mean over heads, texts and seeds; None without texts
    pseudo_share            likewise: what no token of the text gets
    extrapolation           {times, kept: {"0": {"perplexity": [one a time] a seed}}}; None without texts
    tokens_per_s            of the median step; peak_memory_mib: None where it is not known
    maps                    causal and stablemask, seed 0: [{layer, head, tokens, rows}]; else absent
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import report
from benchmarks.lm.measures import share_positions
from benchmarks.lm.presets import parameters
from benchmarks.lm.train import Piece, median_speed


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    known = [x for x in values if x is not None]
    if not known:
        return None
    return {"mean": statistics.fmean(known), "min": min(known), "max": max(known), "values": known}


def record_of(pieces: list[Piece], measured: list[dict[str, Any]], preset: str) -> dict[str, Any]:
    """pieces that are done, with what lm_measures.measure() says of each."""
    first = pieces[0]
    corpus, size = first.corpus, first.size
    found = {(p.variant.name, p.seed): (p, m) for p, m in zip(pieces, measured, strict=True)}
    causal = {seed: piece.validation[-1][1] for (name, seed), (piece, _) in found.items() if name == "causal"}
    variants = {}
    for name in dict.fromkeys(name for name, _ in found):
        mine = [found[key] for key in sorted(found) if key[0] == name]
        variants[name] = _variant([p for p, _ in mine], [m for _, m in mine], causal)
    config = {
        "preset": preset, **asdict(size), "position": first.position, "seeds": sorted({p.seed for p in pieces}),
        "window": size.length, "text": corpus.name, "tokens": corpus.fingerprint,
        "parameters": parameters(size),
        "training_documents": corpus.documents[0], "training_bytes": corpus.text_bytes[0],
        "training_tokens": len(corpus.training), "validation_documents": corpus.documents[1],
        "validation_bytes": corpus.text_bytes[1], "validation_tokens": len(corpus.validation),
        "tokens_seen": size.steps * size.rows * size.length, "trained_at": sorted({p.commit for p in pieces}),
    }  # fmt: skip
    return {"benchmark": "lm", "config": config, "variants": variants}


def _variant(pieces: list[Piece], measured: list[dict[str, Any]], causal: dict[int, float]) -> dict[str, Any]:
    size, variant = pieces[0].size, pieces[0].variant
    losses = {p.seed: p.validation[-1][1] for p in pieces}
    result: dict[str, Any] = {
        "label": variant.label,
        "seeds": list(losses),
        "loss": spread(list(losses.values())),
        "perplexity": spread([math.exp(p.validation[-1][2]) for p in pieces]),
        "curve": {"steps": [s for s, _, _ in pieces[0].validation], "loss": [[x for _, x, _ in p.validation] for p in pieces]},
    }
    if variant.name != "causal" and causal.keys() & losses.keys():
        result["difference"] = spread([losses[seed] - causal[seed] for seed in losses if seed in causal])
    for name in ("first_token_share", "pseudo_share"):
        tables = [m[name] for m in measured]
        known = tables[0] is not None
        mean = (
            [[statistics.fmean(x) for x in zip(*layers, strict=True)] for layers in zip(*tables, strict=True)] if known else None
        )
        result[name] = {"positions": share_positions(size.length), "by_layer": mean} if known else None
    longer = [m["extrapolation"] for m in measured]
    result["extrapolation"] = longer[0] and {
        "times": longer[0]["times"],
        "texts": longer[0]["texts"],
        "kept": {kept: {"perplexity": [x["kept"][kept] for x in longer]} for kept in longer[0]["kept"]},
    }
    result["tokens_per_s"] = spread([median_speed(p) for p in pieces])
    result["peak_memory_mib"] = spread([p.peak_mib for p in pieces])
    maps = next((m["maps"] for m in measured if m["maps"]), None)
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
    columns = ("", "tokens/s (median step)", "peak memory (MiB)")
    parts.append(
        "Training speed in the median step, and most memory (on a CPU the whole process's, libraries included):\n\n"
        + report.markdown_table(columns, rows)
    )
    return "\n\n".join(parts)


def _loss_table(variants: Any) -> str:
    columns = ("", "seeds", "loss (nats a byte)", "minus causal, same seed", "perplexity (a token)")
    rows = []
    for v in variants:
        difference = v.get("difference")
        higher = f", higher with {sum(x > 0 for x in difference['values'])} of {len(difference['values'])}" if difference else ""
        rows.append((
            v["label"], len(v["seeds"]), _mean(v["loss"], ".4f"), _mean(difference, "+.4f") + higher,
            _mean(v["perplexity"], ".2f"),
        ))  # fmt: skip
    return "Validation loss, mean (smallest to largest of the seeds):\n\n" + report.markdown_table(columns, rows)


def _share_table(variants: Any, length: int) -> str:
    positions = share_positions(length)
    shown = [p for p in (4, 16, 64, length - 1) if p in positions]
    rows = []
    for v in variants:
        cells = []
        for key in ("first_token_share", "pseudo_share"):
            mean = [statistics.fmean(x) for x in zip(*v[key]["by_layer"], strict=True)]
            cells += [f"{mean[positions.index(p)]:.3f}" for p in shown]
        rows.append((v["label"], *cells))
    columns = ("", *(f"first token, after {p}" for p in shown), *(f"no token, after {p}" for p in shown))
    return (
        "Attention to the first token of the text, and to no token of it (the mass, or the artificial token), from a query that "
        "has so many tokens before it; mean over layers, heads, texts and seeds:\n\n" + report.markdown_table(columns, rows)
    )


def _longer_table(variants: Any) -> str:
    rows, times = [], next(iter(variants))["extrapolation"]["times"]
    for v in variants:
        for kept, found in v["extrapolation"]["kept"].items():
            values = zip(*found["perplexity"], strict=True)
            cells = [_mean(spread(x), ".2f") for x in values]
            name = v["label"] + (f", first {kept} kept" if kept != "0" else "")
            rows.append((name, *cells))
    columns = ("", *(f"{x}x" for x in times))
    return (
        "Perplexity of the tokens between half and all of so many times the training length, by window attention over the most "
        "recent keys, as many as the training length:\n\n" + report.markdown_table(columns, rows)
    )


def _mean(x: dict[str, Any] | None, form: str) -> str:
    if x is None:
        return ""
    several = len(x["values"]) > 1
    return f"{x['mean']:{form}}" + (f" ({x['min']:{form}} to {x['max']:{form}})" if several else "")


def notes(record: dict[str, Any], figures: list[str]) -> str:
    config = record["config"]
    seeds = len(config["seeds"])
    variants = record["variants"].values()
    fewer = [v["label"] for v in variants if len(v["seeds"]) < seeds]
    return "\n\n".join([
        *(f"![{name}]({name})" for name in figures),
        (f"{seeds} seeds" if seeds > 1 else "One seed: a difference of a few hundredths of a nat is noise")
        + (f"; fewer for {', '.join(fewer)}" if fewer else "")
        + ". Variants with one seed had the same first weights and the same batches in the same order. "
        f"Trained at commit {', '.join(config['trained_at'])}.",
        ", ".join(f"{key} {value}" for key, value in config.items()) + ".",
    ])  # fmt: skip
