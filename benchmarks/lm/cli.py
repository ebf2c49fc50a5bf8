"""Does it help? A small LLaMA-style decoder learns real text with StableMask and with its rivals, and is measured.

    python -m benchmarks.lm                # causal against StableMask on Python's own standard library; two minutes on two cores
    python -m benchmarks.lm --variants all --seeds 3 --steps 1000 --text benchmarks/out/anarchism    # published: 45 minutes
    python -m benchmarks.lm --preset 71M --dataset wikitext-103 --variants all --seeds 3        # on a GPU

A run is made of pieces, a variant and a seed each (train.py), first every variant with seed 0, then with seed 1. Whatever
stops a run, the same command goes on with it; --finished measures what is there and trains nothing. Variants that share a seed
share their first weights and see the same batches in the same order; what differs is log M (variants.py).

The published run reads An Anarchist FAQ, 143 long English essays (11.7 MB), from Debian's package anarchism 15.3-3:

    apt-get download anarchism && dpkg -x anarchism_15.3-3_all.deb debian
    mkdir -p benchmarks/out && cp -r debian/usr/share/doc/anarchism/markdown benchmarks/out/anarchism
    gunzip -r benchmarks/out/anarchism

Where the rooms are: presets.py (sizes), text.py and tokens.py (text), model.py, train.py, measures.py (what
is measured), record.py (the result), figures.py (drawings). Where the cores are shared, OMP_NUM_THREADS=1 keeps threads
from waiting for one another.
"""

import argparse
import json
import shlex
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.lm import figures as lm_figures
from benchmarks.lm.measures import measure
from benchmarks.lm.presets import PRESETS, READING, Size, parameters
from benchmarks.lm.record import notes, record_of, tables
from benchmarks.lm.text import read_text
from benchmarks.lm.tokens import DATASETS, Corpus, read_dataset, tokenise
from benchmarks.lm.train import Piece, pick_device, rows_for, train
from benchmarks.lm.variants import ALL, named


def parse(argv: list[str]) -> tuple[report.Parser, argparse.Namespace]:
    parser = report.Parser(prog="python -m benchmarks.lm", description="Train small decoders: StableMask and its rivals.")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="model and training (default %(default)s)")
    parser.add_argument(
        "--variants", default="causal,stablemask",
        help=f"of {', '.join(v.name for v in ALL)}, stablemask-GAMMA, with commas; or all (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--position", choices=("rope", "alibi"), default="rope", help="encoding (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 (default %(default)s)")
    parser.add_argument("--steps", type=int, help="of each piece (default: the preset's)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", type=Path, help="file or folder of UTF-8 text (default: Python's standard library)")
    text.add_argument("--dataset", choices=DATASETS, help="by Hugging Face's datasets, from their hub")
    parser.add_argument("--run", type=Path, help="folder of the checkpoints (default benchmarks/out/lm-PRESET-POSITION)")
    parser.add_argument("--finished", action="store_true", help="train nothing: measure the pieces that are finished")
    parser.add_argument("--out", type=Path, default=report.OUT, help="folder for the results (default %(default)s)")
    return parser, parser.parse_args(argv)


def names_of(variants: str) -> list[str]:
    names = [name.strip() for name in variants.split(",")]
    return [v.name for v in ALL] if names == ["all"] else list(dict.fromkeys(names))


def check_result(stem: Path, size: Size, corpus: Corpus) -> None:
    """Raises FileExistsError where the folder holds the result of another configuration, which would be overwritten."""
    path = stem.with_name(stem.name + ".json")
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


def pieces_of(args: argparse.Namespace, size: Size, corpus: Corpus, device: torch.device) -> list[Piece]:
    variants = [named(name) for name in names_of(args.variants)]
    if args.position == "alibi" and any(variant.rescaled for variant in variants):
        raise ValueError("--position: stablemask-rescaled is a study of rope alone")
    run = args.run or report.OUT / f"lm-{args.preset}-{args.position}"
    if run.exists() and not run.is_dir():
        raise NotADirectoryError(f"--run: {run} is not a folder")
    pieces = [
        Piece(variant, seed, size, args.position, corpus, run / f"{variant.name}-seed{seed}", device)
        for seed in range(args.seeds)
        for variant in variants
    ]
    for piece in pieces:
        piece.load()  # one that does not fit is refused before any work
    return pieces


def train_all(pieces: list[Piece]) -> None:
    total = sum(piece.size.steps for piece in pieces)
    done = sum(len(piece.training) for piece in pieces)
    with tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, smoothing=0.02) as bar:

        def watch(piece: Piece, speed: float) -> None:
            loss = statistics.fmean(piece.training[-20:])
            bar.set_postfix_str(f"{piece.folder.name} {loss:.3f} nats/token, {speed:,.0f} tokens/s", refresh=False)
            bar.update()

        for piece in pieces:
            train(piece, watch)


def main(argv: list[str] | None = None, size: Size | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser, args = parse(argv)
    size, device = size or PRESETS[args.preset], pick_device()
    try:
        report.at_least("--seeds", args.seeds, 1)
        if args.steps is not None:
            report.at_least("--steps", args.steps, 1)
            size = replace(size, steps=args.steps, warmup=max(1, round(size.warmup * args.steps / size.steps)))
        for name in names_of(args.variants):
            named(name)
        corpus = tokenise(read_dataset(args.dataset) if args.dataset else read_text(args.text), size.vocab)
        rows_for(corpus, size)
        pieces = pieces_of(args, size, corpus, device)
        if args.finished and not any(piece.done for piece in pieces):
            raise ValueError(f"--finished: no piece of this run is finished in {pieces[0].folder.parent}")
        what = "lm" if args.preset == "tiny" and args.position == "rope" else f"lm-{args.preset}-{args.position}"
        stem = report.result_stem(report.out_folder(args.out), what.lower(), device)
        check_result(stem, size, corpus)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(
        f"{corpus.name}: {corpus.documents[0]} documents, {corpus.text_bytes[0]:,} bytes, {len(corpus.training):,} tokens; "
        f"validation: {corpus.documents[1]} documents, {corpus.text_bytes[1]:,} bytes\n"
        f"{args.preset}: {parameters(size):,} parameters, {size.steps * size.rows * size.length:,} tokens a piece"
        + (f"\n{READING}" if args.preset != "tiny" else "")
    )
    if not args.finished:
        train_all(pieces)
    pieces = [piece for piece in pieces if piece.done]
    measured = [measure(piece) for piece in tqdm(pieces, unit="piece", desc="measuring", dynamic_ncols=True)]
    record = record_of(pieces, measured, args.preset)
    source = report.environment(shlex.join(["python", "-m", "benchmarks.lm", *argv]), device)
    figures = [path.name for path in lm_figures.draw(record, stem)]
    title = f"StableMask and its rivals on {corpus.name}, {args.preset}, {args.position}"
    report.write(stem, title, source, tables(record), notes(record, figures), record)
    print(tables(record))
    print(f"wrote {stem}.md and .json, {', '.join(figures)}")
    print(json.dumps({"benchmark": "lm", "variants": {name: v["loss"] for name, v in record["variants"].items()}}))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
