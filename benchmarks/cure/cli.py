"""Does StableMask cure a pretrained model of its attention sinks? Illness, switch and cure on one page.

    python -m benchmarks.cure                                        # SmolLM2-135M on Python's library; hours on two cores
    python -m benchmarks.cure --text benchmarks/out/anarchism        # published
    python -m benchmarks.cure --variants none --long 0               # what needs no training: half an hour
    python -m benchmarks.cure --finished                             # measures what is trained, and trains nothing
    python -m benchmarks.cure --known                                # writes what is known by now

The text is fetched as benchmarks.lm's docstring says; the model comes from PyPI (model.py). Every fine-tune is a training run
with a folder of its own (train.py), and what is measured of it is kept there: whatever stops it, the same command goes on.
Started twice, two processes share the work. Where the cores are shared, OMP_NUM_THREADS=1 keeps threads from waiting for one
another.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks import report
from benchmarks.cure import figures, sinks, stages, untrained
from benchmarks.cure.model import NAME, folder_of, load
from benchmarks.cure.record import record_of
from benchmarks.cure.stages import HeldOut, Untrained
from benchmarks.cure.tables import tables
from benchmarks.cure.text import Corpus, tokenise
from benchmarks.cure.train import Size, TrainingRun, train_all
from benchmarks.cure.variants import ALL, BY_NAME, LONG, Variant
from benchmarks.lm.text import read_text
from benchmarks.lm.tokens import replace_whole

SINK_ROWS, SINK_ORDER = 4, 1000  # rows on which levels and values are measured, of an order that nothing is trained on


def parse(argv: list[str] | None) -> tuple[report.Parser, argparse.Namespace]:
    parser = report.Parser("cure", "A pretrained model's attention sinks: seen, replaced, fine-tuned away.")
    meaning = f"folder of Transformers, or a .gguf file (default: {NAME}, from PyPI)"
    parser.add_argument("--model", type=Path, help=meaning)
    parser.text()
    meaning = f"all, none, or of {', '.join(BY_NAME)}, with commas (default %(default)s)"
    parser.add_argument("--variants", default="all", help=meaning)
    parser.number("--steps", 45, "of each fine-tune")
    parser.number("--orders", 3, "of the rows, for the variants of the main table")
    parser.number("--long", 300, f"steps of the longer fine-tunes of {', '.join(LONG)}; 0 for none", least=0)
    parser.number("--rows", 16, "held-out rows", least=2)
    parser.number("--long-rows", 8, "held-out rows of 2,048 tokens", least=0)
    parser.add_argument("--run", type=Path, help="folder of the checkpoints (default benchmarks/out/cure)")
    parser.add_argument("--finished", action="store_true", help="train nothing: measure the training runs that are finished")
    parser.add_argument("--known", action="store_true", help="train and measure nothing: write what is known by now")
    return parser, parser.parse(argv)


def variants_of(names: str) -> list[Variant]:
    if names in ("all", "none"):
        return list(ALL) if names == "all" else []
    unknown = [name for name in names.split(",") if name not in BY_NAME]
    if unknown:
        raise ValueError(f"--variants: no such variant: {unknown[0]}; there are {', '.join(BY_NAME)}, all, none")
    return [variant for variant in ALL if variant.name in names.split(",")]


def plan(chosen: Sequence[Variant], size: Size, orders: int, long: int) -> list[tuple[Variant, int, int]]:
    """(variant, order, steps) of every run, the most telling first."""
    main = [variant for variant in chosen if variant.kind == "main"]
    runs = [(variant, 0, size.steps) for variant in chosen]
    runs += [(variant, order, size.steps) for order in range(1, orders) for variant in main]
    lengthened = [BY_NAME[name] for name in LONG if BY_NAME[name] in chosen]
    return runs + ([(variant, 0, long) for variant in lengthened] if long else [])


def measured_sinks(model_folder: Path, corpus: Corpus, size: Size, folder: Path, device: torch.device) -> sinks.Sinks:
    """Of the untrained model, kept in the folder of the runs: their levels are these."""
    path = folder / "sinks.pt"
    if not path.exists():
        rows_RL = corpus.training_rows(size.length, SINK_ORDER)[:SINK_ROWS, :-1].to(device)
        found = sinks.measure(load(model_folder, device), rows_RL)
        replace_whole(path, lambda new: torch.save(tuple(found), new))
    return sinks.Sinks(*torch.load(path, weights_only=True, map_location=device))


def held_out_of(corpus: Corpus, size: Size, rows: int, long_rows: int, device: torch.device) -> HeldOut:
    window = size.length // 4
    parts = corpus.held_out_rows(size.length, rows), corpus.held_out_rows(8 * size.length, long_rows)
    if len(parts[0]) < 2 or not len(corpus.training_rows(size.length, 0)):
        raise ValueError(
            f"--text: {corpus.name} is too short: it takes documents of more than {size.length} tokens, one to train on and two "
            f"rows held out, got {len(corpus.training_rows(size.length, 0))} and {len(parts[0])}"
        )
    return HeldOut(parts[0].to(device), parts[1].to(device), window)


def main(argv: list[str] | None = None, size: Size | None = None) -> None:
    parser, args = parse(argv)
    size, device = replace(size or Size(), steps=args.steps), report.pick_device()
    folder = args.run or report.OUT / "cure"
    with parser.refusing():
        chosen = variants_of(args.variants)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"--run: {folder} is not a folder")
        result = report.Result(parser, args.out, "cure", device)
        model_folder = folder_of(args.model)
        corpus = tokenise(read_text(args.text), model_folder, AutoTokenizer.from_pretrained(model_folder))
        held_out = held_out_of(corpus, size, args.rows, args.long_rows, device)
        folder.mkdir(parents=True, exist_ok=True)
        found = measured_sinks(model_folder, corpus, size, folder, device)
        runs = []
        for variant, order, steps in plan(chosen, size, args.orders, args.long):
            name = f"{variant.name}-order{order}" + ("" if steps == size.steps else f"-{steps}")
            runs.append(
                TrainingRun(variant, order, replace(size, steps=steps), corpus, model_folder, found, folder / name, device)
            )
            runs[-1].load()  # one that does not fit is refused before any work
    if not args.finished and not args.known:
        train_all(runs)
    masses = untrained.masses(found)
    before = [Untrained(name, found, model_folder, size.length, folder / "untrained", device) for name in masses]
    if not args.known:
        stages.measure_all(before, runs, held_out)
    record = record_of(runs, folder / "untrained", found, size, held_out, NAME if args.model is None else args.model.name)
    summary = {"variants": {key: x["losses"]["window"]["late"] for key, x in record["variants"].items()}}
    title = f"Attention sinks of {record['config']['model']}: seen, replaced, fine-tuned away"
    result.publish(title, tables(record), notes(record, len(runs)), record, figures.of_run(record), summary)


def notes(record: dict, planned: int) -> str:
    config = record["config"]
    counts = {what: sum(len(x["orders"]) for x in record[what].values()) for what in ("training", "variants")}
    missing = (
        f" Of {planned} planned training runs {counts['training']} are trained and {counts['variants']} measured."
        if counts["variants"] < planned
        else ""
    )
    shown = {key: ", ".join(value) if isinstance(value, list) else value for key, value in config.items()}
    return (
        f"All variants saw the same rows in the same order, and all are measured on the same held-out rows, in float32.{missing} "
        f"No training used a window.\n\n{report.listed(shown)}"
    )
