"""Does it help? A small LLaMA-style decoder learns real text with StableMask and with its baselines.

    python -m benchmarks.lm        # causal against StableMask on Python's library; two minutes on two cores
    python -m benchmarks.lm --variants all --seeds 3 --steps 1000 --text benchmarks/out/anarchism  # published
    python -m benchmarks.lm --preset 71M --dataset wikitext-103 --variants all --seeds 3    # on a GPU

Each variant and seed is a training run of its own (train.py), first every variant with seed 0, then with seed
1. Whatever stops it, the same command goes on with it; --finished measures what is there and trains nothing.
Variants that share a seed share their first weights and see the same batches in the same order; what differs
is log M (variants.py).

The published text is An Anarchist FAQ, 143 long English essays (11.7 MB), from Debian's package anarchism
15.3-3:

    apt-get download anarchism && dpkg -x anarchism_15.3-3_all.deb debian
    mkdir -p benchmarks/out && cp -r debian/usr/share/doc/anarchism/markdown benchmarks/out/anarchism
    gunzip -r benchmarks/out/anarchism

Where the cores are shared, OMP_NUM_THREADS=1 keeps threads from waiting for one another.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.lm import figures
from benchmarks.lm.measures import measure
from benchmarks.lm.presets import PRESETS, READING, Size, parameters
from benchmarks.lm.record import notes, record_of, tables
from benchmarks.lm.text import read_text
from benchmarks.lm.tokens import DATASETS, Corpus, read_dataset, tokenise
from benchmarks.lm.train import TrainingRun, rows_for, train_all
from benchmarks.lm.variants import ALL, Variant, named


def parse(argv: list[str] | None) -> tuple[report.Parser, argparse.Namespace]:
    parser = report.Parser("lm", "Train small decoders: StableMask and its baselines.")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="model and training (default %(default)s)")
    names = ", ".join(v.name for v in ALL)
    meaning = f"of {names}, stablemask-GAMMA, with commas; or all (default %(default)s)"
    parser.add_argument("--variants", default="causal,stablemask", help=meaning)
    parser.add_argument("--position", choices=("rope", "alibi"), default="rope", help="encoding (default %(default)s)")
    parser.number("--seeds", 1, "how many, from 0")
    parser.number("--steps", None, "of each training run (default: the preset's)")
    text = parser.add_mutually_exclusive_group()
    parser.text(text)
    text.add_argument("--dataset", choices=DATASETS, help="by Hugging Face's datasets, from their hub")
    parser.add_argument("--run", type=Path, help="folder of the checkpoints (default benchmarks/out/lm-PRESET-POSITION)")
    parser.add_argument("--finished", action="store_true", help="train nothing: measure the training runs that are finished")
    return parser, parser.parse(argv)


def variants_of(names: str) -> list[Variant]:
    return list(ALL) if names.strip() == "all" else [named(name) for name in dict.fromkeys(map(str.strip, names.split(",")))]


def check_result(path: Path, size: Size, corpus: Corpus) -> None:
    """Raises FileExistsError where path holds the result of another configuration."""
    if not path.exists():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (ValueError, KeyError, TypeError):
        config = {}
    for name, value in {**asdict(size), "text": corpus.name, "tokens": corpus.fingerprint}.items():
        if config.get(name) != value:
            raise FileExistsError(
                f"--out: {path} is the result of another configuration, with {name} {config.get(name)} where this run has "
                f"{value}: give another folder, or move that result away"
            )


def runs_of(args: argparse.Namespace, size: Size, corpus: Corpus, device: torch.device) -> list[TrainingRun]:
    variants = variants_of(args.variants)
    if args.position == "alibi" and any(variant.rescaled for variant in variants):
        raise ValueError("--position: stablemask-rescaled is a study of rope alone")
    folder = args.run or report.OUT / f"lm-{args.preset}-{args.position}"
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--run: {folder} is not a folder")
    runs = [
        TrainingRun(variant, seed, size, args.position, corpus, folder / f"{variant.name}-seed{seed}", device)
        for seed in range(args.seeds)
        for variant in variants
    ]
    for run in runs:
        run.load()  # one that does not fit is refused before any work
    if args.finished and not any(run.done for run in runs):
        raise ValueError(f"--finished: no training run is finished in {folder}")
    return runs


def main(argv: list[str] | None = None, size: Size | None = None) -> None:
    parser, args = parse(argv)
    size, device = size or PRESETS[args.preset], report.pick_device()
    if args.steps is not None:
        size = replace(size, steps=args.steps, warmup=max(1, round(size.warmup * args.steps / size.steps)))
    with parser.refusing():
        variants_of(args.variants)
        corpus = tokenise(read_dataset(args.dataset) if args.dataset else read_text(args.text), size.vocab)
        rows_for(corpus, size)
        runs = runs_of(args, size, corpus, device)
        what = "lm" if args.preset == "tiny" and args.position == "rope" else f"lm-{args.preset}-{args.position}"
        result = report.Result(parser, args.out, what.lower(), device)
        check_result(result.path(".json"), size, corpus)
    print(
        f"{corpus.name}: {corpus.documents[0]} documents, {corpus.text_bytes[0]:,} bytes, {len(corpus.training):,} tokens; "
        f"validation: {corpus.documents[1]} documents, {corpus.text_bytes[1]:,} bytes\n"
        f"{args.preset}: {parameters(size):,} parameters, {size.steps * size.rows * size.length:,} tokens per training run"
        + (f"\n{READING}" if args.preset != "tiny" else "")
    )
    if not args.finished:
        train_all(runs)
    done = [run for run in runs if run.done]
    measured = [(run, measure(run)) for run in tqdm(done, unit="run", desc="measuring", dynamic_ncols=True)]
    record = record_of(measured, args.preset)
    title = f"StableMask and its baselines on {corpus.name}, {args.preset}, {args.position}"
    summary = {"variants": {name: v["loss"] for name, v in record["variants"].items()}}
    result.publish(title, tables(record), notes(record), record, figures.of_run(record), summary)
