"""Fine-tuning a causal model into StableMask: what the switch costs, and what a short fine-tune brings back.

    python -m benchmarks.finetune

A small LLaMA of Transformers learns the bytes of real text with plain causal attention. Then three copies of it go on with the
same batches: still causal; StableMask head-wise from the first step; StableMask with GammaSchedule, which brings the mass in
over the first half of the steps. The loss is nats a byte on other files along the way and before the first step, where
head-wise is what a user gets who only changes the flag.
"""

import copy
import json
import shlex
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks import report
from benchmarks.lm.text import SEPARATOR, cut_rows, read_text
from sm_flex_transformers import GammaSchedule

CAUSAL, AT_ONCE, SCHEDULED = "causal", "head-wise from the start", "gamma schedule"


@dataclass(frozen=True)
class Size:
    layers: int = 4
    width: int = 128
    heads: int = 4
    length: int = 128
    rows: int = 16
    validation_rows: int = 256
    pretraining_lr: float = 2e-3
    fine_tuning_lr: float = 5e-4


class Curve(TrainerCallback):
    """Loss on the held-out rows after some of the steps, the first of them before any."""

    def __init__(self, held_out: Tensor, at: set[int], bar: tqdm) -> None:
        self.held_out, self.at, self.bar = held_out, at, bar
        self.losses: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.bar.update()
        self.measure(model, state.global_step)

    @torch.no_grad()
    def measure(self, model: Any, step: int) -> None:
        if step in self.at:
            model.eval()
            parts = self.held_out.split(32)
            losses = [model(rows, labels=rows, use_cache=False).loss.item() for rows in parts]
            self.losses[step] = sum(loss * len(rows) for loss, rows in zip(losses, parts, strict=True)) / len(self.held_out)
            model.train()


def new_model(size: Size, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=SEPARATOR + 1, hidden_size=size.width, intermediate_size=8 * size.width // 3, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, max_position_embeddings=size.length, tie_word_embeddings=True,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM, rows: Tensor, size: Size, steps: int, seed: int, lr: float, callbacks: list[TrainerCallback]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=size.rows, learning_rate=lr, warmup_steps=steps // 20,
            lr_scheduler_type="cosine", weight_decay=0.1, report_to=[], save_strategy="no", logging_strategy="no", seed=seed,
            disable_tqdm=True, use_cpu=not torch.cuda.is_available(), max_grad_norm=1.0,
        )  # fmt: skip
        data: Any = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks).train()


def run(training: Tensor, held_out: Tensor, size: Size, pretraining: int, steps: int, seed: int, bar: tqdm) -> dict[str, Any]:
    """The causal model's loss and each variant's loss after 0, ... of the fine-tuning steps."""
    model = new_model(size, seed)
    last = Curve(held_out, {pretraining}, bar)
    train(model, training, size, pretraining, seed, size.pretraining_lr, [last])
    at = {0, *(round(steps * share) for share in (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1))}
    curves = {}
    for name in (CAUSAL, AT_ONCE, SCHEDULED):
        variant, curve = copy.deepcopy(model), Curve(held_out, at, bar)
        callbacks: list[TrainerCallback] = [curve]
        if name != CAUSAL:
            variant.set_attn_implementation("stablemask")
        if name == SCHEDULED:
            callbacks.insert(0, GammaSchedule(steps=max(1, steps // 2)))
            variant.config.stablemask = {"gamma": 10.0}  # where the schedule starts
        curve.measure(variant, 0)
        train(variant, training, size, steps, seed + 1, size.fine_tuning_lr, callbacks)
        curves[name] = curve.losses
    return {"before": last.losses[pretraining], "after": curves}


def table(results: list[dict[str, Any]]) -> str:
    steps = list(results[0]["after"][CAUSAL])
    rows = []
    for name in results[0]["after"]:
        cells = [statistics.fmean(r["after"][name][step] for r in results) for step in steps]
        rows.append((name, *(f"{cell:.4f}" for cell in cells)))
    return report.markdown_table(("nats a byte", *(f"after {step} steps" for step in steps)), rows)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, color in ((CAUSAL, "tab:gray"), (AT_ONCE, "tab:blue"), (SCHEDULED, "tab:green")):
        steps = list(results[0]["after"][name])
        axes.plot(
            steps, [statistics.fmean(r["after"][name][s] for r in results) for s in steps], "o-", color=color, ms=4, label=name
        )
    axes.set(xlabel="fine-tuning steps", ylabel="validation loss (nats a byte)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None, size: Size | None = None) -> None:
    argv, size = sys.argv[1:] if argv is None else argv, size or Size()
    parser = report.Parser(prog="python -m benchmarks.finetune", description="A causal model fine-tuned into StableMask.")
    parser.add_argument("--text", type=Path, help="file or folder of UTF-8 text (default: Python's standard library)")
    parser.add_argument("--pretraining", type=int, default=1500, help="steps of the causal model (default %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of each fine-tune (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 (default %(default)s)")
    parser.add_argument("--out", type=Path, default=report.OUT, help="folder for the results (default %(default)s)")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        for option, value in (("--pretraining", args.pretraining), ("--steps", args.steps), ("--seeds", args.seeds)):
            report.at_least(option, value, 1)
        text = read_text(args.text)
        training, held_out = (cut_rows(documents, size.length - 1) for documents in (text.training, text.validation))
        if len(training) < size.rows or not len(held_out):
            raise ValueError(f"--text: {text.name} is too short for a batch of {size.rows} rows of {size.length} bytes")
        stem = report.result_stem(report.out_folder(args.out), "finetune", device)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    held_out = held_out[torch.linspace(0, len(held_out) - 1, min(size.validation_rows, len(held_out))).long()]
    source = report.environment(shlex.join(["python", "-m", "benchmarks.finetune", *argv]), device)
    with tqdm(total=args.seeds * (args.pretraining + 3 * args.steps), unit="step", dynamic_ncols=True) as bar:
        results = [
            run(training.long(), held_out.long().to(device), size, args.pretraining, args.steps, seed, bar)
            for seed in range(args.seeds)
        ]
    record = {"benchmark": "finetune", "results": results, "config": {**asdict(size), "text": text.name, **vars(args)}}
    record["config"] = {key: str(value) if isinstance(value, Path) else value for key, value in record["config"].items()}
    print(table(results))
    draw(results, stem.with_name(stem.name + ".png"))
    notes = (
        f"![losses]({stem.name}.png)\n\nMean over {args.seeds} seed(s). The causal model had {args.pretraining} steps before. "
        "After 0 steps: the flag alone (the schedule starts at gamma 10, which is all but causal). "
        + ", ".join(f"{key} {value}" for key, value in asdict(size).items())
        + "."
    )
    report.write(stem, "Fine-tuning a causal model into StableMask", source, table(results), notes, record)
    print(f"wrote {stem}.png, .md and .json")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
