"""When does StableMask gain or lose against causal attention in a small model, and why? One change at a time.

    python -m benchmarks.lm.why --text my_folder

Each row of the result is a variant of benchmarks.lm with the tiny preset, whose validation loss is held
against causal attention trained the same way from the same seeds. The questions:

- training length: the difference along the training.
- share at the start: with all scores 0 the rows are scaled down by (p+1) / (p+1+M(p)). Does the difference
  follow that share over gamma? Does it go where rows are scaled back up ("rescaled"), or the mass fades in ("faded")?
- initialisation: output projections that start at 0, so that attention adds nothing at first.
- the learning rate: a third of it; ten times its warm-up.
- positions: learned absolute ones, which tell a model what the mass would; and bytes instead of tokens. nanoGPT's
  own script has both (nanogpt_curves.py).
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks import plot, report
from benchmarks.lm.presets import PRESETS, Size
from benchmarks.lm.text import BYTES, Text, read_text
from benchmarks.lm.tokens import tokenise
from benchmarks.lm.train import TrainingRun, rows_for, train_all
from benchmarks.lm.variants import Mass, named


class Setting(NamedTuple):
    name: str
    variants: tuple[str, ...]
    changes: Mapping[str, Any] = MappingProxyType({})  # of the size
    position: str = "rope"
    times_warmup: int = 1


BOTH = ("causal", "stablemask")
ABSOLUTE = "learned absolute positions"
# A setting may come twice: the order is that in which they are trained.
SETTINGS = (
    Setting("as benchmarks.lm", (*BOTH, "stablemask-faded", "stablemask-rescaled")),
    Setting("output projections start at 0", BOTH, {"init": "zero"}),
    Setting("as benchmarks.lm", ("stablemask-0.00390625", "stablemask-0.03125", "stablemask-0.5", "stablemask-4")),
    Setting("ten times the warm-up", BOTH, times_warmup=10),
    Setting(ABSOLUTE, BOTH, position="absolute"),
    Setting("bytes, not tokens", BOTH, {"vocab": BYTES}),
    Setting("bytes and learned absolute positions", BOTH, {"vocab": BYTES}, position="absolute"),
    Setting("a third of the learning rate", BOTH, {"peak_lr": 1e-3, "last_lr": 1e-4}),
    Setting(ABSOLUTE, ("stablemask-0.5", "stablemask-rescaled", "stablemask-faded"), position="absolute"),
)


def runs_of(size: Size, seeds: int, folder: Path, text: Text, device: torch.device) -> list[tuple[str, TrainingRun]]:
    """(setting, training run), first all with seed 0."""
    corpora = {vocab: tokenise(text, vocab) for vocab in {size.vocab, *(s.changes.get("vocab", size.vocab) for s in SETTINGS)}}
    runs = []
    for seed in range(seeds):
        for number, setting in enumerate(SETTINGS):
            changed = replace(size, warmup=setting.times_warmup * size.warmup, **setting.changes)
            corpus = corpora[changed.vocab]
            rows_for(corpus, changed)
            for name in setting.variants:
                where = folder / f"{number}-{name}-seed{seed}"
                runs.append((setting.name, TrainingRun(named(name), seed, changed, setting.position, corpus, where, device)))
                runs[-1][1].load()
    return runs


def mean_share_at_start(run: TrainingRun) -> float:
    """Over heads and the N positions, all scores 0."""
    if run.variant.rescaled:
        return 1.0
    mass = Mass(run.variant, run.size.heads, run.size.length, run.size.width // run.size.heads)
    mass.progress = 0.0
    return mass.share_at_scores_0(torch.arange(run.size.length)).mean().item()


def results_of(runs: list[tuple[str, TrainingRun]]) -> list[dict[str, Any]]:
    """Per setting and variant: losses of the finished runs, and their differences from causal's, by seed."""
    settings = [setting.name for setting in SETTINGS]
    done = {(setting, run.variant.name, run.seed): run for setting, run in runs if run.done}
    found = dict.fromkeys((setting, run.variant.name) for setting, run in runs)
    results = []
    for setting, name in sorted(found, key=lambda x: settings.index(x[0])):
        seeds = sorted(seed for s, n, seed in done if (s, n) == (setting, name) and (s, "causal", seed) in done)
        if not seeds:
            continue
        mine = done[setting, name, seeds[0]]
        loss, causal = ([[nats for _, nats, _ in done[setting, n, seed].validation] for seed in seeds] for n in (name, "causal"))
        results.append({
            "setting": setting, "variant": name, "label": mine.variant.label, "seeds": seeds,
            "steps": [step for step, _, _ in mine.validation], "loss": loss, "difference": np.subtract(loss, causal).tolist(),
            "share_at_start": mean_share_at_start(mine),
        })  # fmt: skip
    return results


def table(results: list[dict[str, Any]]) -> str:
    steps = results[0]["steps"]
    shown = sorted({0, len(steps) // 3 - 1, 2 * len(steps) // 3 - 1, len(steps) - 1} - {-1})
    columns = ("setting", "variant", "seeds", "share at start", "loss", *(f"minus causal, step {steps[i]}" for i in shown))
    rows = []
    for r in results:
        by_step = list(zip(*r["difference"], strict=True))
        differences = ["" if r["variant"] == "causal" else report.mean_and_range(by_step[i], "+.4f") for i in shown]
        loss = np.mean(r["loss"], axis=0)[-1]
        rows.append((r["setting"], r["label"], len(r["seeds"]), f"{r['share_at_start']:.2f}", f"{loss:.4f}", *differences))
    return report.markdown_table(columns, rows)


def draw(results: list[dict[str, Any]]) -> Figure:
    """The difference from causal attention along the training: left over settings, right over masses."""
    figure = plot.figure(10, 4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    base = SETTINGS[0].name
    for axes, title, key, chosen in (
        (left, "StableMask, head-wise, in several settings", "setting", [r for r in results if r["variant"] == "stablemask"]),
        (right, f"other masses, {base}", "label", [r for r in results if r["setting"] == base and r["variant"] != "causal"]),
    ):
        for result, marker in zip(chosen, "osD^vPX*<>", strict=False):
            values = np.array(result["difference"])
            (line,) = axes.plot(result["steps"], values.mean(0), marker=marker, label=result[key])
            axes.vlines(result["steps"], values.min(0), values.max(0), color=line.get_color(), linewidth=1)
        axes.axhline(0, color="black", linestyle="--", linewidth=1)
        axes.set(xlabel="training steps", title=title)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    left.set_ylabel("loss minus causal's (nats per byte)")
    return figure


def main(argv: list[str] | None = None, size: Size | None = None) -> None:
    parser = report.Parser("lm.why", "Why StableMask gains or loses in a small model.")
    parser.text()
    parser.number("--steps", 600, "of each training")
    parser.number("--seeds", 2, "how many, from 0")
    parser.add_argument("--run", type=Path, default=report.OUT / "lm-why", help="folder of checkpoints (default %(default)s)")
    parser.add_argument("--finished", action="store_true", help="train nothing: report the trainings that are finished")
    args, device = parser.parse(argv), report.pick_device()
    size = replace(size or PRESETS["tiny"], steps=args.steps, warmup=max(1, args.steps // 20), validations=6)
    with parser.refusing():
        text = read_text(args.text)
        runs = runs_of(size, args.seeds, args.run, text, device)
        result = report.Result(parser, args.out, "lm-why", device)
        if args.finished and not results_of(runs):
            raise ValueError(f"--finished: no training in {args.run} is finished")
    if not args.finished:
        train_all([run for _, run in runs])
    results = results_of(runs)
    config = {**asdict(size), "text": text.name}
    notes = (
        "Validation loss in nats per byte, and its difference from causal attention in the same setting with the same seed: "
        "mean over seeds (smallest to largest).\n\n"
        "Share at start: what of a row is real while all scores are 0, over heads and positions.\n\n"
        f"Trained at commit {', '.join(sorted({run.commit for _, run in runs if run.done}))}. {report.listed(config)}"
    )
    title = "When does StableMask gain or lose in a small model?"
    result.publish(title, table(results), notes, {"results": results, "config": config}, {"": draw(results)})


if __name__ == "__main__":
    main()
