"""Fine-tuning a causal model into StableMask: what the switch costs, and what a short fine-tune brings back.

    python -m benchmarks.finetune

A small LLaMA of Transformers learns the bytes of real text with plain causal attention. Then three copies of
it go on with the same batches: still causal; StableMask head-wise from the first step; StableMask with
GammaSchedule, which brings the mass in over the first half of the steps. The loss is in nats per byte on
other files, along the way and before the first step. There, head-wise is what a user gets who only changes
the flag.
"""

import copy
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks import plot, report
from benchmarks.lm.text import SEPARATOR, cut_rows, evenly, read_text
from sm_flex_transformers import GammaSchedule

CAUSAL, AT_ONCE, SCHEDULED = "causal", "head-wise from the start", "gamma schedule"
VARIANTS = {CAUSAL: "tab:gray", AT_ONCE: "tab:blue", SCHEDULED: "tab:green"}


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
    for name in VARIANTS:
        variant, curve = copy.deepcopy(model), Curve(held_out, at, bar)
        callbacks: list[TrainerCallback] = [curve]
        if name != CAUSAL:
            variant.set_attn_implementation("stablemask")
        if name == SCHEDULED:
            callbacks.insert(0, GammaSchedule(steps=max(1, steps // 2)))
            variant.config.stablemask = {"gamma": float("inf")}  # where the schedule starts
        curve.measure(variant, 0)
        train(variant, training, size, steps, seed + 1, size.fine_tuning_lr, callbacks)
        curves[name] = curve.losses
    return {"before": last.losses[pretraining], "after": curves}


def means(results: list[dict[str, Any]], name: str) -> dict[int, float]:
    """Over seeds, after each of some steps."""
    return {step: statistics.fmean(r["after"][name][step] for r in results) for step in results[0]["after"][name]}


def table(results: list[dict[str, Any]]) -> str:
    rows = [(name, *(f"{x:.4f}" for x in means(results, name).values())) for name in VARIANTS]
    return report.markdown_table(("nats per byte", *(f"after {step} steps" for step in means(results, CAUSAL))), rows)


def draw(results: list[dict[str, Any]]) -> Figure:
    figure = plot.figure(6, 3.4)
    axes = figure.subplots()
    for name, color in VARIANTS.items():
        curve = means(results, name)
        axes.plot(list(curve), list(curve.values()), "o-", color=color, label=name)
    axes.set(xlabel="fine-tuning steps", ylabel="validation loss (nats per byte)")
    axes.legend()
    return figure


def main(argv: list[str] | None = None, size: Size | None = None) -> None:
    size, device = size or Size(), report.pick_device()
    parser = report.Parser("finetune", "A causal model fine-tuned into StableMask.")
    parser.text()
    parser.number("--pretraining", 1500, "steps of the causal model")
    parser.number("--steps", 300, "of each fine-tune")
    parser.number("--seeds", 1, "how many, from 0")
    args = parser.parse(argv)
    with parser.refusing():
        text = read_text(args.text)
        training, held_out = (cut_rows(documents, size.length - 1) for documents in (text.training, text.validation))
        if len(training) < size.rows or not len(held_out):
            raise ValueError(f"--text: {text.name} is too short for a batch of {size.rows} rows of {size.length} bytes")
        result = report.Result(parser, args.out, "finetune", device)
    training, held_out = training.long(), evenly(held_out, size.validation_rows).long().to(device)
    with tqdm(total=args.seeds * (args.pretraining + 3 * args.steps), unit="step", dynamic_ncols=True) as bar:
        seeds = range(args.seeds)
        results = [run(training, held_out, size, args.pretraining, args.steps, seed, bar) for seed in seeds]
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    record = {"results": results, "config": {**asdict(size), **config, "text": text.name}}
    notes = (
        f"Mean over {args.seeds} seed(s). The causal model had {args.pretraining} steps before. After 0 steps: the flag alone "
        f"(the schedule starts at gamma 10, which is all but causal). {report.listed(asdict(size))}"
    )
    title = "Fine-tuning a causal model into StableMask"
    result.publish(title, table(results), notes, record, {"": draw(results)})


if __name__ == "__main__":
    main()
