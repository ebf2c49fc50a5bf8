"""The record of benchmarks.cure, for programs and for figures.py.

    untrained[mass]     {label, losses, own, whole}, the model as it is
    variants[key]       {label, kind, steps, orders, losses, own, whole}; key: its name, with the steps behind it where they
                        are not config["steps"]. losses: {view: {all, late: [per row] per order}}; own, whole:
                        [measures.Looked.result() per order]
    training[key]       {label, kind, steps, orders, nats, gradients: [per step] per order}, also of what is not measured yet
    stream[key]         {label, nats: [per block] per row}
    rounded[key]        {label, nats: {rounding: [per row]}}
    sinks               {level, share, gamma: [per head] per layer; value_norm: [per layer]}

Numbers of one row or order are paired with those of the same place in every other list.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cure import untrained
from benchmarks.cure.sinks import Sinks
from benchmarks.cure.stages import BLOCK, HeldOut, read
from benchmarks.cure.train import Size, TrainingRun
from benchmarks.cure.variants import ALL, Variant


def record_of(runs: Sequence[TrainingRun], base: Path, sinks: Sinks, size: Size, held_out: HeldOut, model: str) -> dict[str, Any]:
    """Of what is measured so far."""
    found = [(run, read(run.folder / "losses.json", held_out)) for run in runs]
    known = [(run, losses) for run, losses in found if losses is not None]
    done = [run for run in runs if run.done]
    corpus = runs[0].corpus
    config = {
        "model": model, "text": corpus.name, "tokens": corpus.fingerprint, "training_documents": len(corpus.training),
        "validation_documents": len(corpus.validation), "training_tokens": sum(map(len, corpus.training)),
        "validation_tokens": sum(map(len, corpus.validation)), **asdict(size), "window": held_out.window,
        "rows": len(held_out.rows_RL), "long_rows": len(held_out.long_rows_RL), "long_length": held_out.long_rows_RL.shape[1] - 1,
        "trained_at": sorted({run.commit for run in done}),
    }  # fmt: skip
    variants = {
        key: _variant(variant, [(run, x) for run, x in known if (run.variant, run.size.steps) == (variant, steps)])
        for key, (variant, steps) in _keys([run for run, _ in known], size).items()
    }
    training = {
        key: _training(variant, [run for run in done if (run.variant, run.size.steps) == (variant, steps)])
        for key, (variant, steps) in _keys(done, size).items()
    }
    return {
        "config": config, "untrained": _untrained(base, held_out), "variants": variants,
        "training": training, "stream": _streams(known, base, size, held_out), "rounded": _rounded(known, base, size, held_out),
        "sinks": {
            "level": sinks.level_LH.tolist(), "share": sinks.share_LH.tolist(), "gamma": sinks.gamma_LH.tolist(),
            "value_norm": sinks.value_LKD.norm(dim=-1).mean(1).tolist(),
        },
    }  # fmt: skip


def _keys(runs: Sequence[TrainingRun], size: Size) -> dict[str, tuple[Variant, int]]:
    """In the order of ALL, the longer ones last."""
    found = {(run.variant, run.size.steps) for run in runs}
    ordered = sorted(found, key=lambda pair: (pair[1], ALL.index(pair[0])))
    return {key_of(variant, steps, size.steps): (variant, steps) for variant, steps in ordered}


def _training(variant: Variant, runs: list[TrainingRun]) -> dict[str, Any]:
    runs = sorted(runs, key=lambda run: run.order)
    return {
        "label": variant.label, "kind": variant.kind, "steps": runs[0].size.steps, "orders": [run.order for run in runs],
        "nats": [run.training for run in runs], "gradients": [run.norms for run in runs],
    }  # fmt: skip


def key_of(variant: Variant, steps: int, usual: int) -> str:
    return variant.name if steps == usual else f"{variant.name}-{steps}"


def _label(run: TrainingRun, size: Size) -> str:
    return run.variant.label + ("" if run.size.steps == size.steps else f", {run.size.steps} steps")


def _variant(variant: Variant, known: list[tuple[TrainingRun, dict[str, Any]]]) -> dict[str, Any]:
    known = sorted(known, key=lambda pair: pair[0].order)
    steps = known[0][0].size.steps
    views = known[0][1]["losses"]
    return {
        "label": variant.label, "kind": variant.kind, "steps": steps, "orders": [run.order for run, _ in known],
        "losses": {view: {part: [x["losses"][view][part] for _, x in known] for part in ("all", "late")} for view in views},
        "own": [x["own"] for _, x in known], "whole": [x["whole"] for _, x in known],
    }  # fmt: skip


def _untrained(base: Path, held_out: HeldOut) -> dict[str, Any]:
    found = {name: read(base / f"losses-{name}.json", held_out) for name in untrained.LABELS}
    return {name: {"label": untrained.LABELS[name], **x} for name, x in found.items() if x is not None}


def _streams(known: list[tuple[TrainingRun, Any]], base: Path, size: Size, held_out: HeldOut) -> dict[str, Any]:
    result: dict[str, Any] = {}
    before = {"causal": "untrained", "mass-value": "untrained, mass with value"}
    sources = [(name, label, base / f"stream-{name}.json") for name, label in before.items()]
    for run, _ in known:
        if run.order == 0:
            sources.append((key_of(run.variant, run.size.steps, size.steps), _label(run, size), run.folder / "stream.json"))
    for i, (name, label, path) in enumerate(sources):
        for view, nats in (read(path, held_out) or {}).items():
            kept = "" if view == "window" else ", first 4 kept"
            key = f"{'untrained-' if i < len(before) else ''}{name}{'' if view == 'window' else '+4'}"
            result[key] = {"label": label + kept, "nats": nats, "block": BLOCK}
    return result


def _rounded(known: list[tuple[TrainingRun, Any]], base: Path, size: Size, held_out: HeldOut) -> dict[str, Any]:
    result = {}
    sources = [("untrained", "untrained", base / "rounded-causal.json")]
    for run, _ in known:
        if run.order == 0:
            sources.append((key_of(run.variant, run.size.steps, size.steps), _label(run, size), run.folder / "rounded.json"))
    for key, label, path in sources:
        nats = read(path, held_out)
        if nats is not None:
            result[key] = {"label": label, "nats": nats}
    return result


def mean(per_order: Sequence[Sequence[float]]) -> float:
    """Over orders and rows."""
    return statistics.fmean(statistics.fmean(rows) for rows in per_order)


def of_shared_orders(ours: dict[str, Any], theirs: dict[str, Any], view: str, other: str, part: str) -> tuple[list, list]:
    """The losses of two variants, of the orders that both were trained on."""
    shared = [order for order in ours["orders"] if order in theirs["orders"]]
    picked = [
        [x["losses"][name][part][x["orders"].index(order)] for order in shared] for x, name in ((ours, view), (theirs, other))
    ]
    return picked[0], picked[1]
