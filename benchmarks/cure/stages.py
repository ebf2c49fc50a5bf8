"""What is measured of each model, kept in its folder as JSON: a run that is killed goes on with the next."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
STREAMED = (
    "untrained causal", "untrained mass-value", "causal", "evicted-mass", "evicted", "evicted-value", "mass", "headwise",
)  # fmt: skip
ROUNDED = (
    "untrained causal", "causal", "evicted-mass", "penalty-mass-value", "mass", "evicted-value", "penalty-causal", "headwise",
)  # fmt: skip


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


class Untrained(NamedTuple):
    """The model as it is, with a mass switched on."""

    name: str
    sinks: Sinks
    model_folder: Path
    length: int
    folder: Path  # of the results
    device: torch.device

    def model(self) -> Any:
        model = load(self.model_folder, self.device)
        untrained.switch(model, self.sinks, self.name, self.length)
        return model


def measure_all(before: Sequence[Untrained], runs: Sequence[TrainingRun], held_out: HeldOut) -> None:
    """Measures what is not known yet and no other process holds: the losses of all first."""
    done = [run for run in runs if run.done]
    tasks = [task for task in _tasks(before, done) if task[0] != "stream" or len(held_out.long_rows_RL)]
    for what, of, name in tqdm(tasks, desc="measuring", unit="model", dynamic_ncols=True):
        path = path_of(what, of)
        with held(path.parent, f"{path.name}.lock") as mine:
            if mine:
                _kept(path, held_out, lambda what=what, of=of, name=name: _measure(what, of, name, held_out))


def _tasks(before: Sequence[Untrained], done: Sequence[TrainingRun]) -> list[tuple[str, Untrained | TrainingRun, str]]:
    """(what, of which model, by the name of STREAMED and ROUNDED)."""
    first = [run for run in done if run.order == 0]
    models: list[tuple[Untrained | TrainingRun, str]] = [(x, f"untrained {x.name}") for x in before]
    models += [(run, run.variant.name) for run in first]
    later = [run for run in done if run.order > 0]
    tasks = [("losses", of, name) for of, name in models] + [("losses", run, run.variant.name) for run in later]
    tasks += [("stream", of, name) for of, name in models if name in STREAMED]
    return tasks + [("rounded", of, name) for of, name in models if name in ROUNDED]


def path_of(what: str, of: Untrained | TrainingRun) -> Path:
    return of.folder / (f"{what}-{of.name}.json" if isinstance(of, Untrained) else f"{what}.json")


def _measure(what: str, of: Untrained | TrainingRun, name: str, held_out: HeldOut) -> Any:
    own = WHOLE if isinstance(of, Untrained) else of.variant.view
    model = of.model() if isinstance(of, Untrained) else of.trained_model()
    if what == "losses":
        return measures.measure(model, held_out.rows_RL, own, held_out.window)
    if what == "rounded":
        return roundings(model, held_out.rows_RL, own)
    views = {"window": View(held_out.window)}
    if name in ("causal", "untrained causal"):
        views["window+4"] = View(held_out.window, measures.KEPT)
    return measures.stream(model, held_out.long_rows_RL, views, BLOCK)


def roundings(model: Any, rows_RL: Tensor, view: View) -> dict[str, Any]:
    """The mean of each row as it is, and with each rounding."""
    found = {"float32": measures.by_row(measures.losses(model, rows_RL, view))["all"]}
    for name, rounding in ROUNDINGS.items():
        with quantised(model, rounding):
            found[name] = measures.by_row(measures.losses(model, rows_RL, view))["all"]
    return found


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
