"""Where does StableMask stop telling the position? Lengths, dtypes, and one layer against two.

    python -m benchmarks.positions.limits                 # three seeds, forty minutes on one core

Where every token is the same, the share s = sigmoid(l - log M) is all that an attention layer learns of its
row. It ends where 1 - s falls below what rounding keeps, eps/4 of the dtype: with all scores 0 and gamma =
0.5, at row 29 in float32 and row 9 in bf16. A trained model moves that row, since its scores lower l: so the
result names the row from which on its first layer has saturated on every head. A model of one layer has
nothing else to go by. A second layer sees which of the early rows is which, and its relative encoding counts
from there.

Two layers also do tasks 3 and 2, with learned position embeddings as a control: where those fail too, the
recipe stops.
"""

import statistics
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.attention.flex_attention import AuxRequest
from tqdm import tqdm

from benchmarks import plot, report
from benchmarks.positions.cli import examples, one_thread, train
from benchmarks.positions.model import ROWS, Block, Decoder, Size
from sm_flex import flex_attention, log_mass

LENGTHS, DTYPES = (128, 256, 512), ("float32", "bfloat16")
LINES = dict(zip(DTYPES, ("-", "--"), strict=True))
UNIFORM, HEADWISE, CONTROL = "rope+stablemask-uniform", "rope+stablemask-headwise", "learned"


class Trial(NamedTuple):
    layers: int
    row: str
    task: int
    length: int
    dtype: str


Results = dict[Trial, dict[str, list[float]]]


def trials(lengths: tuple[int, ...]) -> list[Trial]:
    chosen = [(layers, row, 1, dtype) for layers in (1, 2) for row in (UNIFORM, HEADWISE) for dtype in DTYPES]
    chosen += [(2, HEADWISE, task, dtype) for task in (3, 2) for dtype in DTYPES]
    chosen += [(2, CONTROL, task, DTYPES[0]) for task in (3, 2)]
    return [Trial(layers, row, task, length, dtype) for layers, row, task, dtype in chosen for length in lengths]


@torch.no_grad()
def saturated_row(model: Decoder, length: int, dtype: torch.dtype) -> int:
    """The first row with 1 - s = exp(log M - l') < eps/4 on all heads of the first layer, for equal tokens."""
    block, tokens = model.blocks[0], examples(1, length, 1, torch.Generator()).tokens
    assert isinstance(block, Block)
    q, k, v = block.attention.heads_of(block.norm_1(model.embed(tokens)))
    mask = block.attention.mask
    _, aux = flex_attention(q, k, v, score_mod=mask, return_aux=AuxRequest(lse=True))
    assert aux.lse is not None
    pseudo_HS = torch.exp(log_mass(mask.gamma, torch.arange(length), length) - aux.lse[0])
    alive = (pseudo_HS >= torch.finfo(dtype).eps / 4).any(dim=0).nonzero()
    return int(alive.max()) + 1 if len(alive) else 0


def run(chosen: list[Trial], steps: int, seeds: int) -> Results:
    results: Results = {trial: {"accuracy": [], "saturated": []} for trial in chosen}
    with tqdm(total=len(chosen) * seeds * steps, unit="step", dynamic_ncols=True) as bar, one_thread():
        for seed, trial in product(range(seeds), chosen):
            layers, row, task, length, _ = trial
            bar.set_postfix_str(", ".join(f"{name} {value}" for name, value in trial._asdict().items()))
            dtype, size = getattr(torch, trial.dtype), Size(layers)
            model, by_position = train(ROWS[row], task, length, steps=steps, seed=seed, dtype=dtype, bar=bar, size=size)
            results[trial]["accuracy"].append(statistics.fmean(by_position))
            if task == 1:
                results[trial]["saturated"].append(saturated_row(model, length, dtype))
    return results


def table(results: Results) -> str:
    rows = []
    for trial, found in results.items():
        right = f"{statistics.fmean(found['accuracy']) * trial.length:.0f}" if trial.task == 1 else ""
        saturated = ", ".join(str(row) for row in found["saturated"])
        rows.append((*trial, report.mean_and_range(found["accuracy"], ".3f"), right, saturated))
    columns = ("layers", "row", "task", "length", "dtype", "accuracy", "rows right", "first layer saturated from row (each seed)")
    return report.markdown_table(columns, rows)


def draw(results: Results, lengths: tuple[int, ...]) -> Figure:
    figure = plot.figure(9, 3.8)
    left, right = figure.subplots(1, 2)

    def means(what: str, *trial: Any) -> list[float]:
        layers, row, task, dtype = trial
        return [statistics.fmean(results[Trial(layers, row, task, length, dtype)][what]) for length in lengths]

    left.plot(lengths, lengths, color="black", linewidth=1, linestyle=":", label="all rows")
    for (row, color), dtype in product(((UNIFORM, "tab:orange"), (HEADWISE, "tab:blue")), DTYPES):
        rows_right = np.multiply(means("accuracy", 1, row, 1, dtype), lengths)
        label = f"{row.removeprefix('rope+stablemask-')}, {dtype}"
        left.plot(lengths, rows_right, LINES[dtype], color=color, marker="o", label=label)
        cross = "x" if dtype == DTYPES[0] else "+"
        left.plot(lengths, means("saturated", 1, row, 1, dtype), cross, color=color, markersize=8)
    left.set(yscale="log", ylabel="rows told apart (task 1)", title="one layer; crosses: where its s rounds to 1")
    curves = ((HEADWISE, DTYPES[0], "tab:blue"), (HEADWISE, DTYPES[1], "tab:blue"), (CONTROL, DTYPES[0], "tab:gray"))
    for (task, marker), (row, dtype, color) in product(((1, "o"), (2, "s"), (3, "^")), curves):
        if Trial(2, row, task, lengths[0], dtype) in results:
            label = f"{'' if dtype == DTYPES[0] else '_'}{row.removeprefix('rope+')}, task {task}"
            right.plot(lengths, means("accuracy", 2, row, task, dtype), LINES[dtype], color=color, marker=marker, label=label)
    right.set(ylim=(0, 1.05), ylabel="accuracy", title="two layers (dashed: bfloat16)")
    for axes in (left, right):
        plot.log_axis(axes, lengths)
        axes.set_xlabel("sequence length")
        axes.legend(fontsize=7)
    return figure


def main(argv: list[str] | None = None, lengths: tuple[int, ...] = LENGTHS) -> None:
    parser = report.Parser("positions.limits", "Where StableMask stops telling the position.")
    parser.number("--steps", 1000, "of each training", least=0)
    parser.number("--seeds", 3, "how many, from 0")
    args = parser.parse(argv)
    with parser.refusing():
        result = report.Result(parser, args.out, "positions-limits", torch.device("cpu"))
    results = run(trials(lengths), args.steps, args.seeds)
    measured = [{**trial._asdict(), **values} for trial, values in results.items()]
    notes = (
        f"Mean over {args.seeds} seed(s), and the range; {args.steps} steps. bfloat16 is autocast. With all scores 0 the share "
        "rounds to 1 from row 29 (float32) and row 9 (bfloat16) on at gamma 0.5, and with the smallest head-wise gamma, 2^-8, "
        "from row 3749 and 1201 on."
    )
    record = {"trials": measured, "steps": args.steps, "seeds": args.seeds}
    title = "Where StableMask stops telling the position"
    result.publish(title, table(results), notes, record, {"": draw(results, lengths)})


if __name__ == "__main__":
    main()
