"""A training run: a variant trained from one seed, in a folder of its own, resumed from its checkpoint.

Weights and batches follow from the seed; the checkpoint holds the rest: weights, optimizer, losses so far. A
run that is killed at any step goes on from its last checkpoint with the losses that it would have had (on a
CPU, with the same number of threads, to the bit).
"""

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import report
from benchmarks.lm.model import Decoder
from benchmarks.lm.presets import Size
from benchmarks.lm.text import IGNORED, Packed, batches, evenly, pack, rows_of
from benchmarks.lm.tokens import Corpus, replace_whole
from benchmarks.lm.variants import Variant

CHECKPOINT = "checkpoint.pt"


@dataclass
class TrainingRun:
    """A variant and a seed, and what is known of them."""

    variant: Variant
    seed: int
    size: Size
    position: str
    corpus: Corpus
    folder: Path
    device: torch.device
    training: list[float] = field(default_factory=list)  # nats per token, each step
    validation: list[tuple[int, float, float]] = field(default_factory=list)  # (steps done, nats per byte, nats per token)
    seconds: list[float] = field(default_factory=list)  # each step
    peak_mib: float | None = None
    commit: str = ""

    @property
    def done(self) -> bool:
        return len(self.training) == self.size.steps

    @property
    def config(self) -> dict[str, Any]:
        """What makes this run this run and no other."""
        return {
            "variant": self.variant.name, "seed": self.seed, "position": self.position, "text": self.corpus.name,
            "tokens": self.corpus.fingerprint, **asdict(self.size),
        }  # fmt: skip

    @property
    def lead(self) -> int | None:
        return self.corpus.artificial if self.variant.token else None

    @property
    def tokens_per_s(self) -> float:
        """Of the median step."""
        return self.size.rows * self.size.length / statistics.median(self.seconds)

    def pack(self, rows_RL: Tensor) -> Packed:
        return pack(rows_RL, self.device, self.corpus.separator, self.lead)

    def losses(self, model: Decoder, batch: Packed, **window: int) -> Tensor:
        """(T,) nats of each target; in bfloat16 on a GPU, float32 on a CPU."""
        with low_precision(self.device):
            return model.losses(batch, **window)

    def new_model(self) -> Decoder:
        torch.manual_seed(self.seed)
        return Decoder(self.size, self.variant, self.position).to(self.device)

    def load(self) -> dict[str, Any] | None:
        """Takes over the checkpoint, if there is one, and returns it; ValueError if it is another run's."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return None
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
            theirs = saved["config"]
        except Exception as error:
            raise ValueError(f"--run: {path} is no checkpoint of benchmarks.lm ({type(error).__name__}): move it away") from None
        for name in {**theirs, **self.config}:
            old, new = theirs.get(name), self.config.get(name)
            if old != new:
                raise ValueError(
                    f"--run: {path} was trained with {name} = {old}, and this run has {new}: give another --run folder, or "
                    "delete that one"
                )
        self.training, self.seconds = list(saved["training"]), list(saved["seconds"])
        self.validation = [tuple(x) for x in saved["validation"]]
        self.peak_mib, self.commit = saved["peak_mib"], saved["commit"]
        return saved

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        saved = {
            "config": self.config, "training": self.training, "validation": self.validation, "seconds": self.seconds,
            "peak_mib": self.peak_mib, "commit": self.commit, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
        }  # fmt: skip
        replace_whole(self.folder / CHECKPOINT, lambda path: torch.save(saved, path))


def rows_for(corpus: Corpus, size: Size) -> tuple[Tensor, Tensor]:
    """Rows of the training text, and validation_rows of the other, evenly spread over it."""
    training_RL, validation_RL = rows_of(corpus.training, size.length), rows_of(corpus.validation, size.length)
    if len(training_RL) < size.rows or len(validation_RL) < 1:
        raise ValueError(
            f"--text: {corpus.name} is too short: a batch takes {size.rows} rows of {size.length} tokens to train on and 1 to "
            f"validate on, got {len(training_RL)} and {len(validation_RL)}"
        )
    return training_RL, evenly(validation_RL, size.validation_rows)


def learning_rate(step: int, size: Size) -> float:
    """Linear from first_lr to peak_lr over the warmup, then down to last_lr, linear or along a cosine."""
    if step < size.warmup:
        return size.first_lr + (size.peak_lr - size.first_lr) * (step + 1) / size.warmup
    part = (step - size.warmup) / max(1, size.steps - size.warmup)
    down = part if size.decay == "linear" else (1 - math.cos(math.pi * part)) / 2
    return size.peak_lr + (size.last_lr - size.peak_lr) * down


def low_precision(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def new_optimizer(model: nn.Module, size: Size) -> torch.optim.Optimizer:
    of_kind: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, p in model.named_parameters():
        of_kind[p.dim() > 1 and not name.endswith("sink_values")].append(p)
    matrices, others = of_kind[True], of_kind[False]  # norms, learned sinks and what they carry do not decay
    groups = [{"params": matrices, "weight_decay": size.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, size.beta_2), eps=1e-8, fused=True)


def train_all(runs: Sequence[TrainingRun]) -> None:
    total, done = sum(run.size.steps for run in runs), sum(len(run.training) for run in runs)
    with tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, smoothing=0.02) as bar:

        def watch(run: TrainingRun) -> None:
            speed = run.size.rows * run.size.length / run.seconds[-1]
            loss = statistics.fmean(run.training[-20:])
            bar.set_postfix_str(f"{run.folder.name} {loss:.3f} nats/token, {speed:,.0f} tokens/s", refresh=False)
            bar.update()

        for run in runs:
            train(run, watch)


def train(run: TrainingRun, watch: Callable[[TrainingRun], None] = lambda run: None) -> None:
    """Trains what is left to train, with a checkpoint at each validation; watch is called after each step."""
    size = run.size
    training_RL, held_out_RL = rows_for(run.corpus, size)
    saved = run.load()
    if run.done:
        return
    model = run.new_model()
    optimizer = new_optimizer(model, size)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    run.commit = run.commit or report.commit()
    every = max(1, size.steps // size.validations)
    source = itertools.islice(batches(training_RL, size.rows, run.seed), len(run.training), None)
    reset_peak(run.device)
    for step in range(len(run.training), size.steps):
        start = time.perf_counter()
        for attention in model.attentions:
            attention.mass.progress = step / size.steps
        run.training.append(one_step(run, model, optimizer, next(source), learning_rate(step, size)))
        run.seconds.append(time.perf_counter() - start)  # the loss was read, which waits for the GPU
        watch(run)
        if (step + 1) % every == 0 or step + 1 == size.steps:
            run.validation.append((step + 1, *validate(run, model, held_out_RL)))
            known = [x for x in (run.peak_mib, peak_mib(run.device)) if x is not None]  # before a kill, and since
            run.peak_mib = max(known, default=None)
            run.save(model, optimizer)


def one_step(run: TrainingRun, model: Decoder, optimizer: torch.optim.Optimizer, rows_RL: Tensor, lr: float) -> float:
    """A step of the optimizer, and the loss before it (nats per token)."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    parts = [run.pack(part) for part in rows_RL.split(run.size.at_once)]
    count = sum(int((part.targets_T != IGNORED).sum()) for part in parts)
    total = torch.zeros((), device=run.device)
    for part in parts:
        loss = run.losses(model, part).sum() / count
        loss.backward()
        total += loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total.item()


@torch.no_grad()
def validate(run: TrainingRun, model: Decoder, held_out_RL: Tensor) -> tuple[float, float]:
    """Nats per byte and nats per token."""
    nats = tokens = text = 0.0
    for rows_RL in held_out_RL.split(min(16, run.size.at_once * 4)):
        batch = run.pack(rows_RL)
        nats += run.losses(model, batch).double().sum().item()
        seen = batch.targets_T[batch.targets_T != IGNORED].cpu()
        tokens += len(seen)
        text += run.corpus.bytes_of[seen].sum().item()
    return nats / text, nats / tokens


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident set starts anew


def peak_mib(device: torch.device) -> float | None:
    """Most memory since reset_peak: the GPU's by PyTorch's count, on Linux the process's; else not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)
