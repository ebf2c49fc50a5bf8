"""When does StableMask gain or lose against causal attention in a small model, and why? Short trainings, one change at a time.

    python -m benchmarks.lm.why --text my_folder

Each row of the result is a variant of benchmarks.lm with the tiny preset, whose validation loss is held against causal attention
trained the same way from the same seeds. The questions:

- training length: the difference along the training.
- share at the start: with all scores 0 the rows are scaled down by (p+1) / (p+1+M(p)). Does the difference follow that share,
  over gamma; does it go where the rows are scaled back up ("rescaled"), or where the mass comes in gradually ("faded")?
- initialisation: output projections that start at 0, so that attention adds nothing at first whatever its scale.
- the learning rate: a third of it; ten times its warm-up.
- positions: learned absolute ones, which tell a model already what the mass would; and bytes in the place of tokens. Both are
  what nanoGPT's own script has (nanogpt_curves.py).
"""

import json
import shlex
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import report
from benchmarks.lm.presets import PRESETS, Size
from benchmarks.lm.text import BYTES, Text, read_text
from benchmarks.lm.tokens import tokenise
from benchmarks.lm.train import Piece, pick_device, rows_for, train
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


def pieces_of(size: Size, seeds: int, folder: Path, text: Text, device: torch.device) -> list[tuple[str, Piece]]:
    """(setting, piece), first all with seed 0."""
    corpora = {vocab: tokenise(text, vocab) for vocab in {size.vocab, *(s.changes.get("vocab", size.vocab) for s in SETTINGS)}}
    pieces = []
    for seed in range(seeds):
        for number, setting in enumerate(SETTINGS):
            changed = replace(size, warmup=setting.times_warmup * size.warmup, **setting.changes)
            rows_for(corpora[changed.vocab], changed)
            for name in setting.variants:
                where = folder / f"{number}-{name}-seed{seed}"
                piece = Piece(named(name), seed, changed, setting.position, corpora[changed.vocab], where, device)
                piece.load()
                pieces.append((setting.name, piece))
    return pieces


def mean_share_at_start(piece: Piece) -> float:
    """Over heads and the N positions, all scores 0."""
    mass = Mass(piece.variant, piece.size.heads, piece.size.length)
    if piece.variant.rescaled:
        return 1.0
    mass.progress = 0.0
    return mass.share_at_scores_0(torch.arange(piece.size.length)).mean().item()


def results_of(pieces: list[tuple[str, Piece]]) -> list[dict[str, Any]]:
    """For each setting and variant: losses of the finished pieces, and their differences from causal with the same seed."""
    results, settings = [], [setting.name for setting in SETTINGS]
    found = dict.fromkeys((setting, piece.variant) for setting, piece in pieces)
    for setting, variant in sorted(found, key=lambda x: settings.index(x[0])):
        mine = {p.seed: p for s, p in pieces if s == setting and p.variant == variant and p.done}
        causal = {p.seed: p for s, p in pieces if s == setting and p.variant.name == "causal" and p.done}
        seeds = sorted(mine.keys() & causal.keys())
        if not seeds:
            continue
        steps = [step for step, _, _ in mine[seeds[0]].validation]
        loss = [[nats for _, nats, _ in mine[seed].validation] for seed in seeds]
        base = [[nats for _, nats, _ in causal[seed].validation] for seed in seeds]
        results.append({
            "setting": setting, "variant": variant.name, "label": variant.label, "seeds": seeds, "steps": steps, "loss": loss,
            "difference": [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(loss, base, strict=True)],
            "share_at_start": mean_share_at_start(mine[seeds[0]]),
        })  # fmt: skip
    return results


def table(results: list[dict[str, Any]]) -> str:
    steps = results[0]["steps"]
    shown = sorted({0, len(steps) // 3 - 1, 2 * len(steps) // 3 - 1, len(steps) - 1} - {-1})
    columns = ("setting", "variant", "seeds", "share at start", "loss", *(f"minus causal, step {steps[i]}" for i in shown))
    rows = []
    for r in results:
        differences = []
        for i in shown:
            values = [one[i] for one in r["difference"]]
            spread = f" ({min(values):+.3f} to {max(values):+.3f})" if len(values) > 1 else ""
            differences.append("" if r["variant"] == "causal" else f"{statistics.fmean(values):+.4f}{spread}")
        loss = statistics.fmean(one[-1] for one in r["loss"])
        rows.append((r["setting"], r["label"], len(r["seeds"]), f"{r['share_at_start']:.2f}", f"{loss:.4f}", *differences))
    return report.markdown_table(columns, rows)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """The difference from causal attention along the training: left over settings, right over masses."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    groups = {
        left: [(r["setting"], r) for r in results if r["variant"] == "stablemask"],
        right: [(r["label"], r) for r in results if r["setting"] == SETTINGS[0].name and r["variant"] != "causal"],
    }
    for axes, title in ((left, "StableMask, head-wise, in several settings"), (right, f"other masses, {SETTINGS[0].name}")):
        for (name, result), marker in zip(groups[axes], "osD^vPX*<>", strict=False):
            values = list(zip(*result["difference"], strict=True))
            (line,) = axes.plot(result["steps"], [statistics.fmean(x) for x in values], marker=marker, markersize=4, label=name)
            axes.vlines(result["steps"], [min(x) for x in values], [max(x) for x in values], color=line.get_color(), linewidth=1)
        axes.axhline(0, color="black", linestyle="--", linewidth=1)
        axes.set_xlabel("training steps")
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("loss minus causal's (nats a byte)")
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None, size: Size | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.Parser(prog="python -m benchmarks.lm.why", description="Why StableMask gains or loses in a small model.")
    parser.add_argument("--text", type=Path, help="file or folder of UTF-8 text (default: Python's standard library)")
    parser.add_argument("--steps", type=int, default=600, help="of each training (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="how many, from 0 (default %(default)s)")
    parser.add_argument("--run", type=Path, default=report.OUT / "lm-why", help="folder of checkpoints (default %(default)s)")
    parser.add_argument("--finished", action="store_true", help="train nothing: report the trainings that are finished")
    parser.add_argument("--out", type=Path, default=report.OUT, help="folder for the results (default %(default)s)")
    args = parser.parse_args(argv)
    size, device = size or PRESETS["tiny"], pick_device()
    try:
        for option, value in (("--steps", args.steps), ("--seeds", args.seeds)):
            report.at_least(option, value, 1)
        size = replace(size, steps=args.steps, warmup=max(1, args.steps // 20), validations=6)
        text = read_text(args.text)
        pieces = pieces_of(size, args.seeds, args.run, text, device)
        stem = report.result_stem(report.out_folder(args.out), "lm-why", device)
        if args.finished and not results_of(pieces):
            raise ValueError(f"--finished: no training in {args.run} is finished")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    source = report.environment(shlex.join(["python", "-m", "benchmarks.lm.why", *argv]), device)
    if not args.finished:
        with tqdm(total=sum(p.size.steps - len(p.training) for _, p in pieces), unit="step", dynamic_ncols=True) as bar:

            def watch(piece: Piece, speed: float) -> None:
                bar.update()

            for _, piece in pieces:
                train(piece, watch)
    results = results_of(pieces)
    draw(results, stem.with_name(stem.name + ".png"))
    notes = (
        f"![difference along the training]({stem.name}.png)\n\n"
        "Validation loss in nats a byte, and its difference from causal attention in the same setting with the same seed: "
        "mean over seeds (smallest to largest).\n\nShare at start: "
        "what of a row is real while all scores are 0, over heads and positions.\n\n"
        f"Trained at commit {', '.join(sorted({p.commit for _, p in pieces if p.done}))}. Text: {text.name}. "
        + ", ".join(f"{key} {value}" for key, value in asdict(size).items())
        + "."
    )
    record = {"benchmark": "lm-why", "results": results, "config": {**asdict(size), "text": text.name}}
    report.write(stem, "When does StableMask gain or lose in a small model?", source, table(results), notes, record)
    print(table(results))
    print(f"wrote {stem}.png, .md and .json")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
