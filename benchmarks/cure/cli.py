"""Does StableMask cure a pretrained model of its attention sinks? Illness, switch and cure on one page."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks import report
from benchmarks.cure import sinks
from benchmarks.cure.model import folder_of, load
from benchmarks.cure.text import Corpus, tokenise
from benchmarks.cure.train import Size, TrainingRun, train_all
from benchmarks.cure.variants import ALL, BY_NAME, LONG, Variant
from benchmarks.lm.text import read_text
from benchmarks.lm.tokens import replace_whole

SINK_ROWS = 4


def parse(argv):
    parser = report.Parser("cure", "A pretrained model's attention sinks: seen, switched, cured.")
    parser.add_argument("--model", type=Path)
    parser.text()
    parser.number("--steps", 45, "of each fine-tune")
    parser.add_argument("--variants", default="all")
    parser.number("--orders", 3, "of the rows")
    parser.number("--long", 300, "steps of the longer fine-tunes, 0 for none", least=0)
    parser.add_argument("--run", type=Path)
    return parser, parser.parse(argv)


def measured_sinks(model_folder, corpus, size, folder, device) -> sinks.Sinks:
    path = folder / "sinks.pt"
    if not path.exists():
        found = sinks.measure(load(model_folder, device), corpus.training_rows(size.length, 1000)[:SINK_ROWS].to(device))
        replace_whole(path, lambda new: torch.save(tuple(found), new))
    return sinks.Sinks(*torch.load(path, weights_only=True, map_location=device))


def runs_of(args, size, corpus, model_folder, found, folder, device):
    def run(variant: Variant, order: int, steps: int) -> TrainingRun:
        name = f"{variant.name}-order{order}" + ("" if steps == size.steps else f"-{steps}steps")
        return TrainingRun(variant, order, replace(size, steps=steps), corpus, model_folder, found, folder / name, device)

    chosen = ALL if args.variants == "all" else [BY_NAME[name] for name in args.variants.split(",")]
    main = [v for v in chosen if v.kind == "main"]
    runs = [run(v, 0, size.steps) for v in chosen]
    runs += [run(v, 1, size.steps) for v in main]
    if args.long:
        runs += [run(BY_NAME[name], 0, args.long) for name in LONG[:2]]
    runs += [run(v, order, size.steps) for order in range(2, args.orders) for v in main]
    if args.long:
        runs += [run(BY_NAME[name], 0, args.long) for name in LONG[2:]]
    return runs


def main(argv=None):
    parser, args = parse(argv)
    size, device = Size(steps=args.steps), report.pick_device()
    folder = args.run or report.OUT / "cure"
    with parser.refusing():
        model_folder = folder_of(args.model)
        corpus = tokenise(read_text(args.text), model_folder, AutoTokenizer.from_pretrained(model_folder))
    folder.mkdir(parents=True, exist_ok=True)
    found = measured_sinks(model_folder, corpus, size, folder, device)
    train_all(runs_of(args, size, corpus, model_folder, found, folder, device))
