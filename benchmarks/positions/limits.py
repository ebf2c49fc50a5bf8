"""Where does StableMask stop telling the position? Lengths, dtypes, and one layer against two.

    python -m benchmarks.positions.limits                 # three seeds, forty minutes on one core

Where every token is the same, the share s = sigmoid(l - log M) is all that an attention layer learns of its row, and it ends
where 1 - s falls below what rounding keeps, eps/4 of the dtype: with all scores 0 and gamma = 0.5, at row 29 in float32 and
row 9 in bf16. A model moves that row, since its scores lower l; so beside the accuracy of task 1 stands the row from which on
the first layer, as trained, has saturated on every head. A model of one layer has nothing else to go by. A second layer has:
it sees which of the early rows is which, and its relative encoding counts from there.

Two layers also do tasks 3 and 2, with learned position embeddings as a control: where those fail too, the recipe stops.
"""

import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch.nn.attention.flex_attention import AuxRequest
from tqdm import tqdm

from benchmarks import report
from benchmarks.positions.cli import examples, one_thread, spread, train
from benchmarks.positions.model import ROWS, Block, Decoder, Size
from sm_flex import flex_attention, log_mass

LENGTHS, DTYPES = (128, 256, 512), ("float32", "bfloat16")
UNIFORM, HEADWISE, CONTROL = "rope+stablemask-uniform", "rope+stablemask-headwise", "learned"


class Trial(NamedTuple):
    layers: int
    row: str
    task: int
    length: int
    dtype: str


def trials(lengths: tuple[int, ...]) -> list[Trial]:
    chosen = [(layers, row, 1, dtype) for layers in (1, 2) for row in (UNIFORM, HEADWISE) for dtype in DTYPES]
    chosen += [(2, HEADWISE, task, dtype) for task in (3, 2) for dtype in DTYPES]
    chosen += [(2, CONTROL, task, DTYPES[0]) for task in (3, 2)]
    return [Trial(layers, row, task, length, dtype) for layers, row, task, dtype in chosen for length in lengths]


@torch.no_grad()
def saturated_row(model: Decoder, length: int, dtype: torch.dtype) -> int:
    """The row from which on every head of the first layer has 1 - s = exp(log M - l') < eps/4, all tokens being equal."""
    block, tokens = model.blocks[0], examples(1, length, 1, torch.Generator()).tokens
    assert isinstance(block, Block)
    q, k, v = block.attention.heads_of(block.norm_1(model.embed(tokens)))
    mask = block.attention.mask
    _, aux = flex_attention(q, k, v, score_mod=mask, return_aux=AuxRequest(lse=True))
    assert aux.lse is not None
    pseudo_HS = torch.exp(log_mass(mask.gamma, torch.arange(length), length) - aux.lse[0])
    alive = (pseudo_HS >= torch.finfo(dtype).eps / 4).any(dim=0).nonzero()
    return int(alive.max()) + 1 if len(alive) else 0


def run(chosen: list[Trial], steps: int, seeds: int) -> dict[Trial, dict[str, list[float]]]:
    results: dict[Trial, dict[str, list[float]]] = {trial: {"accuracy": [], "saturated": []} for trial in chosen}
    with tqdm(total=len(chosen) * seeds * steps, unit="step", dynamic_ncols=True) as bar, one_thread():
        for seed in range(seeds):
            for trial in chosen:
                bar.set_postfix_str(f"{trial.layers} layer(s), {trial.row}, task {trial.task}, {trial.length}, {trial.dtype}")
                dtype = getattr(torch, trial.dtype)
                model, by_position = train(
                    ROWS[trial.row],
                    trial.task,
                    trial.length,
                    steps=steps,
                    seed=seed,
                    dtype=dtype,
                    bar=bar,
                    size=Size(trial.layers),
                )
                results[trial]["accuracy"].append(statistics.fmean(by_position))
                if trial.task == 1:
                    results[trial]["saturated"].append(saturated_row(model, trial.length, dtype))
    return results


def table(results: dict[Trial, dict[str, list[float]]]) -> str:
    def rows_right(trial: Trial, values: list[float]) -> str:
        return f"{statistics.fmean(values) * trial.length:.0f}" if trial.task == 1 else ""

    rows = [
        (*trial, spread(r["accuracy"]), rows_right(trial, r["accuracy"]), ", ".join(str(row) for row in r["saturated"]))
        for trial, r in results.items()
    ]
    columns = ("layers", "row", "task", "length", "dtype", "accuracy", "rows right", "first layer saturated from row (each seed)")
    return report.markdown_table(columns, rows)


def draw(results: dict[Trial, dict[str, list[float]]], lengths: tuple[int, ...], path: Path) -> None:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(lengths, lengths, color="black", linewidth=1, linestyle=":", label="all rows")
    for row, color in ((UNIFORM, "tab:orange"), (HEADWISE, "tab:blue")):
        for dtype, line in zip(DTYPES, ("-", "--"), strict=True):
            trials = [Trial(1, row, 1, length, dtype) for length in lengths]
            right_rows = [statistics.fmean(results[t]["accuracy"]) * t.length for t in trials]
            limit = [statistics.fmean(results[t]["saturated"]) for t in trials]
            label = f"{row.removeprefix('rope+stablemask-')}, {dtype}"
            left.plot(lengths, right_rows, line, color=color, marker="o", markersize=4, label=label)
            left.plot(lengths, limit, linestyle="none", color=color, marker="x" if line == "-" else "+", markersize=8)
    left.set(xscale="log", yscale="log", xlabel="sequence length", ylabel="rows told apart (task 1)", xticks=lengths)
    left.set_title("one layer; crosses: where its s rounds to 1", fontsize=10)
    for task, marker in ((1, "o"), (2, "s"), (3, "^")):
        for row, dtype, color, line in (
            (HEADWISE, DTYPES[0], "tab:blue", "-"),
            (HEADWISE, DTYPES[1], "tab:blue", "--"),
            (CONTROL, DTYPES[0], "tab:gray", "-"),
        ):
            trials = [Trial(2, row, task, length, dtype) for length in lengths]
            if trials[0] in results:
                means = [statistics.fmean(results[trial]["accuracy"]) for trial in trials]
                label = f"{row.removeprefix('rope+')}, task {task}" if line == "-" else None
                right.plot(lengths, means, line, color=color, marker=marker, markersize=4, label=label)
    right.set(xscale="log", ylim=(0, 1.05), xlabel="sequence length", ylabel="accuracy", xticks=lengths)
    right.set_title("two layers (dashed: bfloat16)", fontsize=10)
    for axes in (left, right):
        axes.set_xticks(lengths, labels=[str(length) for length in lengths])
        axes.minorticks_off()
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None, lengths: tuple[int, ...] = LENGTHS) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.Parser(
        prog="python -m benchmarks.positions.limits", description="Where StableMask stops telling the position."
    )
    parser.add_argument("--steps", type=int, default=1000, help="of each training (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (default %(default)s)")
    parser.add_argument("--out", type=Path, default=report.OUT, help="folder for the results (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        report.at_least("--steps", args.steps, 0)
        report.at_least("--seeds", args.seeds, 1)
        stem = report.result_stem(report.out_folder(args.out), "positions-limits", torch.device("cpu"))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    source = report.environment(shlex.join(["python", "-m", "benchmarks.positions.limits", *argv]), torch.device("cpu"))
    results = run(trials(lengths), args.steps, args.seeds)
    measured: list[dict[str, Any]] = [{**trial._asdict(), **values} for trial, values in results.items()]
    record = {"benchmark": "positions_limits", "trials": measured, "steps": args.steps, "seeds": args.seeds}
    print(table(results))
    draw(results, lengths, stem.with_name(stem.name + ".png"))
    notes = (
        f"![limits]({stem.name}.png)\n\nMean over {args.seeds} seed(s), and the range; {args.steps} steps. bfloat16 is autocast. "
        "With all scores 0 the share rounds to 1 from row 29 (float32) and row 9 (bfloat16) on at gamma 0.5, and with the "
        "smallest head-wise gamma, 2^-8, from row 3749 and 1201 on."
    )
    report.write(stem, "Where StableMask stops telling the position", source, table(results), notes, record)
    print(f"wrote {stem}.png, .md and .json")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
