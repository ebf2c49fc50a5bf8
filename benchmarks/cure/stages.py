"""What is measured of each model, kept in its folder as JSON: a run that is killed goes on with the next."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.cure import measures, untrained
from benchmarks.cure.model import load
from benchmarks.cure.quantise import ROUNDINGS, quantised
from benchmarks.cure.sinks import Sinks
from benchmarks.cure.train import TrainingRun, held
from benchmarks.cure.views import WHOLE, View
from benchmarks.lm.tokens import replace_whole

BLOCK = 64  # tokens of a point of the streaming figure


@dataclass(frozen=True)
class HeldOut:
    """The rows that all models are measured on."""

    rows_RL: Tensor
    long_rows_RL: Tensor  # for streaming; may be none
    window: int

    @property
    def config(self) -> dict[str, Any]:
        return {
            "rows": list(self.rows_RL.shape), "long_rows": list(self.long_rows_RL.shape), "window": self.window,
            "tokens": int(self.rows_RL.sum() + self.long_rows_RL.sum()),
        }  # fmt: skip


def of_training(runs: Sequence[TrainingRun], held_out: HeldOut, streamed: Sequence[str], rounded: Sequence[str]) -> None:
    """Measures every run that is done: the losses first, of all."""
    done = [run for run in runs if run.done]
    tasks: list[tuple[str, TrainingRun]] = [("losses", run) for run in done]
    tasks += [("stream", run) for run in done if run.variant.name in streamed and run.order == 0]
    tasks += [("rounded", run) for run in done if run.variant.name in rounded and run.order == 0]
    for what, run in tqdm(tasks, desc="measuring", unit="model", dynamic_ncols=True):
        with held(run.folder) as mine:
            if mine:
                _kept(run.folder / f"{what}.json", held_out, lambda run=run, what=what: _measure(what, run, held_out))


def _measure(what: str, run: TrainingRun, held_out: HeldOut) -> Any:
    model = run.trained_model()
    if what == "losses":
        return measures.measure(model, held_out.rows_RL, run.variant.view, held_out.window)
    if what == "rounded":
        return roundings(model, held_out.rows_RL, run.variant.view)
    views = {"window": View(held_out.window)}
    if run.variant.name == "causal":
        views["window+4"] = View(held_out.window, measures.KEPT)
    return measures.stream(model, held_out.long_rows_RL, views, BLOCK)


def roundings(model: Any, rows_RL: Tensor, view: View) -> dict[str, Any]:
    """The mean of each row as it is, and with each rounding."""
    found = {"float32": measures.by_row(measures.losses(model, rows_RL, view))["all"]}
    for name, rounding in ROUNDINGS.items():
        with quantised(model, rounding):
            found[name] = measures.by_row(measures.losses(model, rows_RL, view))["all"]
    return found


def of_untrained(model_folder: Path, sinks: Sinks, held_out: HeldOut, length: int, folder: Path, device: torch.device) -> None:
    """The model as it is with each mass; streaming; the illness itself."""
    with held(folder) as mine:
        if not mine:
            return
        model = load(model_folder, device)
        for name in tqdm(list(untrained.masses(sinks)), desc="untrained", unit="mass", dynamic_ncols=True):
            untrained.switch(model, sinks, name, length)
            _kept(
                folder / f"losses-{name}.json", held_out,
                lambda: measures.measure(model, held_out.rows_RL, WHOLE, held_out.window),
            )  # fmt: skip
            views = {"causal": {"window": View(held_out.window), "window+4": View(held_out.window, measures.KEPT)}}
            views["mass-value"] = {"window": View(held_out.window)}
            if name in views:
                _kept(
                    folder / f"stream-{name}.json", held_out,
                    lambda views=views[name]: measures.stream(model, held_out.long_rows_RL, views, BLOCK),
                )  # fmt: skip
        untrained.switch(model, sinks, "causal", length)
        _kept(folder / "rounded-causal.json", held_out, lambda: roundings(model, held_out.rows_RL, WHOLE))


def _kept(path: Path, held_out: HeldOut, measure: Callable[[], Any]) -> Any:
    """What path holds of the same rows, or what is measured now."""
    known = read(path, held_out)
    if known is None:
        known = measure()
        saved = json.dumps({"held_out": held_out.config, "found": known})
        replace_whole(path, lambda new: new.write_text(saved, encoding="utf-8"))
    return known


def read(path: Path, held_out: HeldOut) -> Any:
    """None where there is nothing, or where it was measured on other rows."""
    if not path.exists():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    return saved["found"] if saved["held_out"] == held_out.config else None
