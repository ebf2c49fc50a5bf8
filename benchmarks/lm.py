"""A first real training: a small decoder learns the bytes of real text, plain causal against StableMask.

    python -m benchmarks.lm                      # Python's own standard library is the text; three minutes on two idle cores
    python -m benchmarks.lm --text my_folder --steps 1000 --gamma 0.5

Both variants start from the same weights, see the same batches in the same order, and take their steps in turn, so that a
busy machine slows both alike. Both run through the same code: causal is ``stablemask(math.inf, length=N)``, whose pseudo
scores -j * inf leave no mass, which is exactly plain causal attention. What differs is log M and nothing else.

Batches are packed documents (lm_text.py): ``varlen_attn`` keeps the documents apart, so no token sees another document, and
the positions (of RoPE in lm_model.py, and of the mass inside varlen_attn) restart at 0 with each. The separator between
documents is read but never predicted, so the loss is nats a byte.

The validation text is other files than the training text. On a CPU a seed gives the same losses every time.
Where the cores are shared, OMP_NUM_THREADS=1 keeps threads from waiting for one another.
"""

import json
import math
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import report
from benchmarks.lm_model import Decoder, Size
from benchmarks.lm_text import SEPARATOR, Packed, Text, batches, cut_rows, pack, read_text
from sm_flex import headwise_gamma, stablemask


@dataclass
class Variant:
    """One of the models that are compared, with what has been measured of it."""

    name: str
    model: Decoder
    optimizer: torch.optim.Optimizer
    training: list[float] = field(default_factory=list)  # nats a byte, each step
    validation: list[tuple[int, float]] = field(default_factory=list)  # (steps done, nats a byte)
    seconds: list[float] = field(default_factory=list)  # each step

    def step(self, batch: Packed, lr: float) -> None:
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with low_precision(batch.tokens_T.device):
            loss = self.model.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.training.append(loss.item())  # waits for the GPU, so the clock sees the whole step
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def validate(self, held_out: list[Packed]) -> None:
        with low_precision(held_out[0].tokens_T.device):
            losses = [self.model.loss(batch).item() for batch in held_out]
        counts = [int((batch.targets_T != SEPARATOR).sum()) for batch in held_out]
        mean = sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts)
        self.validation.append((len(self.training), mean))


def new_variant(name: str, gamma: float | Tensor, size: Size, seed: int, device: torch.device) -> Variant:
    torch.manual_seed(seed)
    model = Decoder(size, stablemask(gamma, length=size.length)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return Variant(name, model, optimizer)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warmup over a twentieth of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def low_precision(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train(variants: list[Variant], training_RL: Tensor, held_out: list[Packed], size: Size, steps: int, seed: int) -> None:
    device = held_out[0].tokens_T.device
    every = max(1, steps // size.validations)
    source = batches(training_RL, size.rows, seed)
    with tqdm(total=steps, unit="step", dynamic_ncols=True) as bar:
        for step in range(steps):
            batch = pack(next(source), device)
            for variant in variants:
                variant.step(batch, learning_rate(step, steps, size.peak_lr))
            if (step + 1) % every == 0 or step + 1 == steps:
                for variant in variants:
                    variant.validate(held_out)
            losses = ", ".join(f"{v.name} {statistics.fmean(v.training[-20:]):.3f}" for v in variants)
            rate = len(variants) * size.rows * size.length / sum(v.seconds[-1] for v in variants)
            bar.set_postfix_str(f"training nats/byte {losses}; {rate:,.0f} tokens/s", refresh=False)
            bar.update()


def save(stem: Path, variants: list[Variant], record: dict[str, Any], source: dict[str, str]) -> None:
    config = record["config"]
    title = f"{config['text']}: causal against StableMask, gamma {config['gamma']}, seed {config['seed']}"
    draw(variants, stem.with_name(stem.name + ".png"), title)
    rows = [(name, f"{result['val_loss']:.4f}", f"{result['tokens_per_s']:,.0f}") for name, result in record["variants"].items()]
    table = report.markdown_table(("variant", "validation loss (nats a byte)", "tokens/s (median step)"), rows)
    settings = ", ".join(f"{key} {value}" for key, value in config.items())
    notes = f"![losses]({stem.name}.png)\n\nOne seed, so a difference of a few hundredths is noise. {settings}."
    report.write(stem, f"A first training: {title}", source, table, notes, record)


def draw(variants: list[Variant], path: Path, title: str) -> None:
    """Left: both losses over the steps. Right: what the eye cannot see there, the difference on the validation text."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for variant, color, dash in zip(variants, ("tab:gray", "tab:blue"), ("--", "-"), strict=True):
        window = max(1, len(variant.training) // 40)
        blocks = torch.tensor(variant.training).unfold(0, window, window).mean(1)
        left.plot([(i + 1) * window for i in range(len(blocks))], blocks, dash, color=color, alpha=0.5, linewidth=1)
        left.plot(*zip(*variant.validation, strict=True), dash, color=color, marker="o", markersize=4, label=variant.name)
    top = 1.4 * max(loss for variant in variants for _, loss in variant.validation)
    bottom = 0.9 * min(variant.validation[-1][1] for variant in variants)
    left.set(xlabel="training steps", ylabel="loss (nats a byte)", ylim=(bottom, top))
    left.legend(title="validation (training: thin)")
    causal, other = (dict(variant.validation) for variant in variants)
    right.plot(list(causal), [other[step] - causal[step] for step in causal], color="tab:blue", marker="o", markersize=4)
    right.axhline(0, color="tab:gray", linestyle="--")
    right.set(xlabel="training steps", ylabel="nats a byte")
    right.set_title("validation: stablemask minus causal", fontsize=10)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_gamma(text: str, heads: int, device: torch.device) -> float | Tensor:
    if text == "headwise":
        return headwise_gamma(heads).to(device)
    try:
        gamma = float(text)
        stablemask(gamma)
    except ValueError:
        raise ValueError(f"--gamma must be headwise or a number >= 0, got {text}") from None
    return gamma


def read_rows(text: Text, size: Size) -> tuple[Tensor, Tensor]:
    """Rows of the training text, and validation_rows of the other, evenly spread over it."""
    training_RL, validation_RL = (cut_rows(documents, size.length) for documents in (text.training, text.validation))
    if len(training_RL) < size.rows or len(validation_RL) < 1:
        raise ValueError(
            f"--text: {text.name} is too short: a batch takes {size.rows} rows of {size.length} bytes to train on and 1 to "
            f"validate on, got {len(training_RL)} and {len(validation_RL)}"
        )
    chosen = torch.linspace(0, len(validation_RL) - 1, min(size.validation_rows, len(validation_RL))).long()
    return training_RL, validation_RL[chosen]


def main(argv: list[str] | None = None, size: Size | None = None) -> None:
    argv, size = sys.argv[1:] if argv is None else argv, size or Size()
    parser = report.Parser(prog="python -m benchmarks.lm", description="Train a small decoder: causal against StableMask.")
    parser.add_argument("--text", type=Path, help="file or folder of UTF-8 text (default: Python's standard library)")
    parser.add_argument("--steps", type=int, default=3200, help="steps of each variant (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default %(default)s)")
    parser.add_argument("--gamma", default="headwise", help="headwise, or a number for every head (default %(default)s)")
    parser.add_argument("--out", type=Path, default=report.OUT, help="folder for the results (default %(default)s)")
    args = parser.parse_args(argv)
    device = pick_device()
    try:
        report.at_least("--steps", args.steps, 1)
        if not 0 <= args.seed < 2**63:
            raise ValueError(f"--seed must be in [0, 2**63), got {args.seed}")
        gamma = read_gamma(args.gamma, size.heads, device)
        text = read_text(args.text)
        training_RL, validation_RL = read_rows(text, size)
        stem = report.result_stem(report.out_folder(args.out), "lm", device)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    held_out = [pack(rows_RL, device) for rows_RL in validation_RL.split(16)]
    variants = [
        new_variant("causal", math.inf, size, args.seed, device),
        new_variant("stablemask", gamma, size, args.seed, device),
    ]
    config = {
        **asdict(size), "steps": args.steps, "seed": args.seed, "gamma": args.gamma, "text": text.name,
        "training_documents": len(text.training), "training_bytes": sum(map(len, text.training)),
        "validation_documents": len(text.validation), "validation_bytes": sum(map(len, text.validation)),
        "parameters": sum(p.numel() for p in variants[0].model.parameters()),
    }  # fmt: skip
    print(
        f"{text.name}: {len(text.training)} documents, {config['training_bytes']:,} bytes; "
        f"validation: {len(text.validation)} documents, {config['validation_bytes']:,} bytes"
    )
    train(variants, training_RL, held_out, size, args.steps, args.seed)
    tokens = size.rows * size.length
    measured = {
        v.name: {"val_loss": v.validation[-1][1], "tokens_per_s": tokens / statistics.median(v.seconds)} for v in variants
    }
    for name, result in measured.items():
        print(f"{name:12s} validation {result['val_loss']:.4f} nats a byte   {result['tokens_per_s']:>9,.0f} tokens/s")
    print("One seed: a difference of a few hundredths of a nat is noise.")
    record = {"benchmark": "lm", "variants": measured, "config": config}
    save(stem, variants, record, report.environment(shlex.join(["python", "-m", "benchmarks.lm", *argv]), device))
    print(f"wrote {stem}.png, .md and .json")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
