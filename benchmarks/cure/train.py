"""A fine-tune: a variant and an order of rows, in a folder of its own, resumed from its checkpoint.

Rows of 256 tokens of single documents, one row a step; AdamW of 2e-4 (5 steps of warm-up, then a cosine to a tenth), betas
0.9 and 0.95, no weight decay, gradients clipped at 1, float32; the embedding, which is the head too, stays as it is. A run that
is killed at any step goes on from its last checkpoint with the losses that it would have had. Several processes may work on
the same runs: each takes those that no other holds.
"""

import fcntl
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import report
from benchmarks.cure.model import load
from benchmarks.cure.sinks import Sinks
from benchmarks.cure.text import Corpus
from benchmarks.cure.variants import Variant, apply, new_log_gammas
from benchmarks.cure.views import mask_of
from benchmarks.lm.tokens import replace_whole
from sm_flex import scaled_dot_product_attention, stablemask

CHECKPOINT, WEIGHTS = "checkpoint.pt", "weights.pt"
LEARNED = "cure-learned-gamma"  # attn_implementation of learned gammas while they are trained
GAMMA_LR = 0.05  # of log gamma
EXCESS = 4.0  # a norm above so many times the median counts as massive to the penalty


@dataclass(frozen=True)
class Size:
    length: int = 256
    steps: int = 45
    lr: float = 2e-4
    warmup: int = 5
    save_every: int = 15


@dataclass
class TrainingRun:
    """A variant and an order of rows, and what is known of them."""

    variant: Variant
    order: int
    size: Size
    corpus: Corpus
    model_folder: Path
    sinks: Sinks
    folder: Path
    device: torch.device
    training: list[float] = field(default_factory=list)  # nats per token, each step
    norms: list[float] = field(default_factory=list)  # of the gradient, each step
    seconds: list[float] = field(default_factory=list)
    commit: str = ""

    @property
    def done(self) -> bool:
        return len(self.training) == self.size.steps and (self.folder / WEIGHTS).exists()

    @property
    def config(self) -> dict[str, Any]:
        """What makes this run this run and no other."""
        size = {key: value for key, value in asdict(self.size).items() if key != "save_every"}
        variant = {key: value for key, value in asdict(self.variant).items() if key not in ("label", "kind")}
        return {"variant": variant, "order": self.order, "tokens": self.corpus.fingerprint, **size}

    def load(self) -> dict[str, Any] | None:
        """Takes over the checkpoint, or what a finished run left; ValueError if it is another run's."""
        path = next((self.folder / name for name in (WEIGHTS, CHECKPOINT) if (self.folder / name).exists()), None)
        if path is None:
            return None
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True, mmap=True)
            theirs = saved["config"]
        except Exception as error:
            raise ValueError(
                f"--run: {path} is no checkpoint of benchmarks.cure ({type(error).__name__}): move it away"
            ) from None
        for name, new in self.config.items():
            if theirs.get(name) != new:
                raise ValueError(
                    f"--run: {path} was trained with {name} = {theirs.get(name)}, and this run has {new}: give another --run "
                    "folder, or delete that one"
                )
        self.training, self.norms = list(saved["training"]), list(saved["norms"])
        self.seconds, self.commit = list(saved["seconds"]), saved["commit"]
        return saved

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """With the optimizer as a checkpoint; without it the run is finished."""
        trained = {name: p for name, p in model.state_dict().items() if name in dict(_trained(model))}
        saved = {
            "config": self.config, "training": self.training, "norms": self.norms, "seconds": self.seconds,
            "commit": self.commit, "model": trained,
        }  # fmt: skip
        if optimizer is not None:
            replace_whole(self.folder / CHECKPOINT, lambda path: torch.save({**saved, "optimizer": optimizer.state_dict()}, path))
            return
        replace_whole(self.folder / WEIGHTS, lambda path: torch.save(saved, path))
        (self.folder / CHECKPOINT).unlink(missing_ok=True)

    def trained_model(self) -> Any:
        """Of a run that is done, with the mass that it was trained with."""
        saved = self.load()
        assert saved is not None
        model = load(self.model_folder, self.device)
        if self.variant.gamma == "learned":
            model.register_parameter("log_gamma_LH", nn.Parameter(new_log_gammas(model)))
        model.load_state_dict(saved["model"], strict=False)
        apply(model, self.variant, self.sinks, self.size.length, self.size.steps, self.size.steps)
        return model


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def learning_rate(step: int, size: Size) -> float:
    """Linear over the warm-up, times a cosine from 1 to a tenth over all steps."""
    return size.lr * min(1.0, (step + 1) / size.warmup) * (0.1 + 0.9 * (1 + math.cos(math.pi * step / size.steps)) / 2)


@contextmanager
def held(folder: Path, name: str = "lock") -> Iterator[bool]:
    """Whether this process got hold of a file in a folder, which it gives back at the end, or when it dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def train_all(runs: Sequence[TrainingRun], after: Callable[[TrainingRun, Any], None] = lambda run, model: None) -> None:
    """Trains what is left to train and no other process holds; after(run, model) once each is done."""
    with tqdm(total=sum(run.size.steps for run in runs), unit="step", dynamic_ncols=True, smoothing=0.02) as bar:

        def watch(run: TrainingRun) -> None:
            bar.set_postfix_str(f"{run.folder.name} {statistics.fmean(run.training[-10:]):.3f} nats/token", refresh=False)
            bar.update()

        for run in runs:
            with held(run.folder) as mine:
                if not mine:
                    continue
                run.load()
                bar.update(len(run.training))
                model = None if run.done else train(run, watch)
                after(run, model)


def train(run: TrainingRun, watch: Callable[[TrainingRun], None] = lambda run: None) -> Any:
    """Trains what is left to train, with checkpoints; returns the model as it is to be measured."""
    size, variant = run.size, run.variant
    saved = run.load()
    if run.done:
        return run.trained_model()
    model = load(run.model_folder, run.device).train()
    model.model.embed_tokens.weight.requires_grad_(False)
    optimizer = new_optimizer(model, variant, run)
    if saved is not None:
        model.load_state_dict(saved["model"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        del saved
    run.commit = run.commit or report.commit()
    rows_RL = run.corpus.training_rows(size.length, run.order)
    for step in range(len(run.training), size.steps):
        start = time.perf_counter()
        apply(model, variant, run.sinks, size.length, step, size.steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, size) * group["times"]
        row_1L = rows_RL[step % len(rows_RL)][None].to(run.device)
        loss, norm = one_step(model, optimizer, row_1L, variant)
        run.training.append(loss)
        run.norms.append(norm)
        run.seconds.append(time.perf_counter() - start)
        watch(run)
        if (step + 1) % size.save_every == 0 and step + 1 < size.steps:
            run.save(model, optimizer)
    run.save(model, None)
    model.set_attn_implementation("stablemask")
    apply(model, variant, run.sinks, size.length, size.steps, size.steps)
    return model.eval()


def new_optimizer(model: Any, variant: Variant, run: TrainingRun) -> torch.optim.Optimizer:
    """And the model made ready for learned gammas."""
    groups: list[dict[str, Any]] = [{"params": [p for _, p in _trained(model)], "times": 1.0}]
    if variant.gamma == "learned":
        log_gamma_LH = nn.Parameter(new_log_gammas(model).to(run.device))
        model.register_parameter("log_gamma_LH", log_gamma_LH)
        groups.append({"params": [log_gamma_LH], "times": GAMMA_LR / run.size.lr})
        _register(log_gamma_LH, run.size.length)
        model.set_attn_implementation(LEARNED)
    fused = run.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=run.size.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)


def _register(log_gamma_LH: Tensor, length: int) -> None:
    """The attention of a model whose gammas are learned: config.stablemask holds plain numbers."""
    from transformers import AttentionInterface

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any) -> Any:
        assert mask is None, "learned gammas are trained on all keys"
        score_mod = stablemask(log_gamma_LH[module.layer_idx].exp(), length=length)
        scale = given["scaling"]
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True, score_mod=score_mod)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(LEARNED, attention)


def one_step(model: Any, optimizer: torch.optim.Optimizer, row_1L: Tensor, variant: Variant) -> tuple[float, float]:
    """A step of the optimizer; the loss before it (nats per token, no penalty) and the norm of the gradient."""
    mask = mask_of(variant.view, row_1L.shape[1] - 1, row_1L.device)
    out = model.model(row_1L[:, :-1], attention_mask=mask, use_cache=False, output_hidden_states=variant.penalty > 0)
    loss = F.cross_entropy(model.lm_head(out.last_hidden_state[0]), row_1L[0, 1:])
    whole = loss if variant.penalty == 0 else loss + variant.penalty * excess(out.hidden_states)
    whole.backward()
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), norm.item()


def excess(hidden_states: Sequence[Tensor]) -> Tensor:
    """By how much the norms of hidden states exceed EXCESS medians: nats, summed over slots, the mean over layers."""
    norms = torch.stack([x[0].float().norm(dim=-1) for x in hidden_states[1:-1]])  # the last one is normalised
    return F.relu((norms / norms.detach().median(1, keepdim=True).values).log() - math.log(EXCESS)).sum(1).mean()
