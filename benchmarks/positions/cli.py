"""Where am I? A small decoder learns the paper's absolute-position tasks (Appendix B.2).

    python -m benchmarks.positions                       # RoPE against RoPE with StableMask, two minutes
    python -m benchmarks.positions --rows rope t5 rope+urpe --tasks 1 --seq-len 128 --seeds 3

Task 1: all tokens are equal, output the position. Task 2: one marked token at a random place, output its
position there and "nothing" elsewhere. Task 3: all tokens are equal, output odd or even.

Accuracy counts every position for tasks 1 and 3, and the marked one alone for task 2, on sequences drawn
anew. Chance is the accuracy of the best constant answer. Tasks 1 and 3 have a single sequence, so a step
takes one. Task 2 has as many sequences as positions: fresh draws test whether the answer was learned, not
whether it generalises.

Every row is trained by the same recipe; seeds draw the weights and the markers. Runs on the CPU in one
thread: tensors this small gain nothing from a second.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import plot, report
from benchmarks.positions.model import ROWS, Decoder, Row, Size

TASKS = {1: "output the position", 2: "output the marked position", 3: "output odd or even"}
DEFAULT_ROWS = ("rope", "rope+stablemask-headwise")
TOKENS_PER_STEP, PEAK_LR, EVALUATED = 2048, 1e-3, 1024


class Examples(NamedTuple):
    """tokens, targets and which positions count for the accuracy, all (B, S)."""

    tokens: Tensor
    targets: Tensor
    counted: Tensor


def examples(task: int, length: int, sequences: int, generator: torch.Generator) -> Examples:
    """sequences of task 2, or the one sequence that tasks 1 and 3 have."""
    if task == 2:
        marked = F.one_hot(torch.randint(length, (sequences,), generator=generator), length)
        return Examples(marked, marked * torch.arange(1, length + 1), marked.bool())
    tokens, positions = torch.zeros(1, length, dtype=torch.long), torch.arange(length)[None]
    return Examples(tokens, positions if task == 1 else positions % 2, torch.ones_like(tokens, dtype=torch.bool))


def num_classes(task: int, length: int) -> int:
    return {1: length, 2: length + 1, 3: 2}[task]


def chance(task: int, length: int) -> float:
    """The accuracy of the best constant answer."""
    return (length + 1) // 2 / length if task == 3 else 1 / length


def train(
    row: Row, task: int, length: int, *, steps: int, seed: int, dtype: torch.dtype, bar: tqdm, size: Size | None = None
) -> tuple[Decoder, list[float]]:
    """A trained decoder and its accuracy at each position (for task 2: where the marker stood there)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(row, size or Size(), length, num_classes(task, length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=max(1, steps), pct_start=0.1)
    for _ in range(steps):
        batch = examples(task, length, max(1, TOKENS_PER_STEP // length), generator)
        with low_precision(dtype):
            logits_BSC = model(batch.tokens)
        losses_BS = F.cross_entropy(logits_BSC.float().mT, batch.targets, reduction="none")
        # What does not count is a matter of itself: in one mean, S-1 times "nothing" would drown the marked position.
        loss = losses_BS[batch.counted].mean()
        if not batch.counted.all():
            loss = loss + losses_BS[~batch.counted].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.update()
    return model, accuracy(model, task, length, dtype, generator)


@torch.no_grad()
def accuracy(model: nn.Module, task: int, length: int, dtype: torch.dtype, generator: torch.Generator) -> list[float]:
    """Of each position, over fresh sequences: for task 2 so many that every position has been marked."""
    batch = examples(task, length, max(EVALUATED, 16 * length), generator)
    right, count = torch.zeros(length), torch.zeros(length)
    for part in zip(*(x.split(EVALUATED) for x in batch), strict=True):
        tokens, targets, counted = part
        with low_precision(dtype):
            answers = model(tokens).argmax(dim=-1)
        right += ((answers == targets) & counted).sum(0)
        count += counted.sum(0)
    return (right / count.clamp(min=1)).tolist()


def low_precision(dtype: torch.dtype) -> torch.autocast:
    """bfloat16 is autocast: weights, normalisations and losses stay float32, as in ordinary training."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


Accuracies = dict[str, dict[int, list[float]]]  # row, task, seed


def measure(rows: list[str], tasks: list[int], length: int, steps: int, seeds: int, dtype: torch.dtype) -> Accuracies:
    results: Accuracies = {name: {task: [] for task in tasks} for name in rows}
    with tqdm(total=len(rows) * len(tasks) * seeds * steps, unit="step", dynamic_ncols=True) as bar, one_thread():
        for seed, name, task in product(range(seeds), rows, tasks):
            bar.set_postfix_str(f"{name}, task {task}, seed {seed}")
            _, by_position = train(ROWS[name], task, length, steps=steps, seed=seed, dtype=dtype, bar=bar)
            results[name][task].append(statistics.fmean(by_position))
    return results


def table(results: Accuracies, length: int) -> str:
    tasks = list(next(iter(results.values())))
    rows = [(name, *(report.mean_and_range(by_task[task], ".3f") for task in tasks)) for name, by_task in results.items()]
    constant = ("*chance*", *(f"*{chance(task, length):.3f}*" for task in tasks))
    return report.markdown_table(("row", *(f"task {task}: {TASKS[task]}" for task in tasks)), [*rows, constant])


def draw(results: Accuracies, length: int) -> Figure:
    names, tasks = list(results), list(next(iter(results.values())))
    figure = plot.figure(2.2 + 2.4 * len(tasks), 1.3 + 0.3 * len(names))
    colors = ["tab:blue" if "stablemask" in name else "tab:gray" for name in names]
    for axes, task in zip(figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks, strict=True):
        values = np.array([results[name][task] for name in names])
        mean = values.mean(1)
        axes.barh(names, mean, xerr=[mean - values.min(1), values.max(1) - mean], color=colors, height=0.7)
        axes.axvline(chance(task, length), color="tab:red", linestyle="--", linewidth=1)
        axes.set(xlim=(0, 1.02), xlabel="accuracy", title=f"({task}) {TASKS[task]}")
        axes.invert_yaxis()
    figure.suptitle(f"sequence length {length}; dashed: chance; whiskers: lowest and highest seed")
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = report.Parser("positions", "The absolute-position tasks of Appendix B.2.")
    parser.add_argument("--tasks", type=int, choices=TASKS, nargs="+", default=list(TASKS), help="(default: all)")
    parser.add_argument("--rows", choices=ROWS, nargs="+", default=DEFAULT_ROWS, help="(default %(default)s)")
    parser.number("--seq-len", 64, "S and the training length N", least=2)
    parser.number("--steps", 1000, "of each training", least=0)
    parser.number("--seeds", 1, "how many, from 0")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the attention and the matmuls")
    args = parser.parse(argv)
    length, tasks, rows = args.seq_len, list(dict.fromkeys(args.tasks)), list(dict.fromkeys(args.rows))
    with parser.refusing():
        result = report.Result(parser, args.out, f"positions-{length}-{args.dtype}", torch.device("cpu"))
    start = time.perf_counter()
    by_seed = measure(rows, tasks, length, args.steps, args.seeds, getattr(torch, args.dtype))
    minutes = (time.perf_counter() - start) / 60
    record = {
        "rows": {name: {task: statistics.fmean(v) for task, v in by_task.items()} for name, by_task in by_seed.items()},
        "chance": {task: chance(task, length) for task in tasks},
        "seq_len": length, "steps": args.steps, "seeds": args.seeds, "dtype": args.dtype, "by_seed": by_seed,
    }  # fmt: skip
    size = Size()
    notes = (
        f"Mean over {args.seeds} seed(s), and the range. {size.layers} layers, width {size.width}, {size.heads} heads; "
        f"{args.steps} steps of AdamW, peak rate {PEAK_LR}, {TOKENS_PER_STEP} tokens per step for task 2; {minutes:.1f} minutes. "
        "Tasks 1 and 3 count every position, task 2 the marked one."
    )
    title = f"Absolute-position tasks (Appendix B.2), sequence length {length}, {args.dtype}"
    result.publish(title, table(by_seed, length), notes, record, {"": draw(by_seed, length)})
