"""Loss curves of the real nanoGPT, plain causal against StableMask, by the launcher and over several seeds.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.nanogpt_curves nanoGPT       # on Python's standard library; 15 minutes on a core

The checkout's scripts are copied to a temporary folder, the text becomes bytes in train.bin and val.bin there
(files of the validation are not those of the training), and nanoGPT's own train.py runs through ``python -m
sm_flex_nanogpt``, once for each attention and seed. nanoGPT has its seed in its code, so a config file, which
its configurator runs as Python inside train.py, puts another in its place.

Without dropout both attentions take the same random numbers: the same weights, and the same batches to train
and to validate on. What differs between the two curves of a seed is the attention.
"""

import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import plot, report
from benchmarks.lm.text import BYTES, Text, read_text
from sm_flex_launcher.flags import BadInput, parse_flags

VALIDATIONS = 8
STEP = re.compile(r"step (\d+): train loss ([\d.]+), val loss ([\d.]+)")
ITER = re.compile(r"iter (\d+): loss ([\d.]+), time ([\d.]+)ms")
CONFIG = """\
import torch as _torch
_manual_seed = _torch.manual_seed
_torch.manual_seed = lambda _: _manual_seed({seed})
"""


@dataclass
class Size:
    """The model and its batches, in nanoGPT's names; 0.8 M parameters."""

    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    block_size: int = 128
    batch_size: int = 16
    eval_iters: int = 20
    learning_rate: float = 1e-3


@dataclass
class Run:
    """One training: the losses that nanoGPT printed, in nats per byte."""

    attn: str
    seed: int
    steps: list[int] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)  # each iteration but the first

    def read(self, line: str) -> int:
        """What a line of train.py's output says; the iteration it names, or -1."""
        if step := STEP.match(line):
            self.steps.append(int(step[1]))
            self.training.append(float(step[2]))
            self.validation.append(float(step[3]))
        if iteration := ITER.match(line):
            if int(iteration[1]) > 0:
                self.milliseconds.append(float(iteration[3]))
            return int(iteration[1])
        return -1


def copy_checkout(checkout: Path, copy: Path, text: Text) -> None:
    """nanoGPT's scripts, with text as bytes in data/text."""
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "data", "assets", "out*", "*.ipynb", "__pycache__"))
    data = copy / "data" / "text"
    data.mkdir(parents=True)
    for name, documents in (("train", text.training), ("val", text.validation)):
        np.frombuffer(b"".join(documents), dtype=np.uint8).astype(np.uint16).tofile(data / f"{name}.bin")
    characters = {i: chr(i) for i in range(BYTES)}
    meta = {"vocab_size": BYTES, "itos": characters, "stoi": {letter: i for i, letter in characters.items()}}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))


def options(size: Size, steps: int, device: torch.device) -> list[str]:
    """nanoGPT's command line for both attentions."""
    values: dict[str, Any] = {
        **asdict(size), "dataset": "text", "device": device.type, "compile": device.type == "cuda",
        "dropout": 0.0, "gradient_accumulation_steps": 1, "log_interval": 1,
        "max_iters": steps, "lr_decay_iters": steps, "eval_interval": steps // VALIDATIONS,
        "warmup_iters": steps // 20, "min_lr": size.learning_rate / 10, "beta2": 0.99,
    }  # fmt: skip
    if device.type == "cpu":
        values["dtype"] = "float32"
    return [f"--{key}={value}" for key, value in values.items()]


def train(copy: Path, run: Run, flags: list[str], bar: tqdm) -> None:
    """nanoGPT's train.py in the copy; RuntimeError with its last words if it fails."""
    config = copy / "config" / f"seed_{run.seed}.py"
    config.parent.mkdir(exist_ok=True)
    config.write_text(CONFIG.format(seed=run.seed))
    command = [sys.executable, "-u", "-m", "sm_flex_nanogpt", "train.py", f"config/{config.name}", *flags]
    path = os.pathsep.join([str(report.ROOT), str(report.ROOT / "integrations")])
    bar.set_description(f"{run.attn}, seed {run.seed}")
    last = []
    with subprocess.Popen(
        command, cwd=copy, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = [*last[-19:], line]
            if run.read(line) > 0:
                bar.update()
                bar.set_postfix_str(f"validation {run.validation[-1]:.3f} nats per byte", refresh=False)
    if process.returncode or not run.steps:
        raise RuntimeError(f"train.py ended with exit code {process.returncode}: {''.join(last)}")


def pairs(runs: list[Run]) -> list[tuple[Run, Run]]:
    """(causal, StableMask) of each seed."""
    return [(a, b) for a in runs for b in runs if a.seed == b.seed and a.attn == "causal" != b.attn]


def table(runs: list[Run]) -> str:
    rows = []
    for causal, ours in pairs(runs):
        a, b = causal.validation[-1], ours.validation[-1]
        speed = f"{statistics.median(causal.milliseconds):.0f} / {statistics.median(ours.milliseconds):.0f}"
        rows.append((causal.seed, f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}", speed))
    columns = ("seed", "causal", "StableMask", "StableMask minus causal", "ms per iteration, causal / StableMask")
    return report.markdown_table(columns, rows)


def verdict(runs: list[Run]) -> str:
    """What held, in figures: the final difference over the seeds."""
    differences = [ours.validation[-1] - causal.validation[-1] for causal, ours in pairs(runs)]
    lower = sum(d < 0 for d in differences)
    spread = f" ± {statistics.stdev(differences):.4f} (standard deviation over the seeds)" if len(differences) > 1 else ""
    return (
        f"StableMask ends lower for {lower} of {len(differences)} seeds; "
        f"StableMask minus causal: {statistics.fmean(differences):+.4f}{spread} nats per byte."
    )


def draw(runs: list[Run], title: str) -> Figure:
    """Left: the validation loss of every run. Right: the difference within each seed."""
    figure = plot.figure(9, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, (causal, ours) in enumerate(pairs(runs)):
        hidden = "_" * min(number, 1)  # one entry in the legend for all seeds
        left.plot(causal.steps, causal.validation, "o--", color="tab:gray", label=hidden + "causal")
        left.plot(ours.steps, ours.validation, "o-", color="tab:blue", label=hidden + "StableMask")
        difference = [b - a for a, b in zip(causal.validation, ours.validation, strict=True)]
        right.plot(causal.steps, difference, "o-", label=f"seed {causal.seed}")
    right.axhline(0, color="tab:gray", linestyle="--")
    left.set(xlabel="iterations", ylabel="validation loss (nats per byte)")
    right.set(xlabel="iterations", ylabel="nats per byte", title="StableMask minus causal")
    for axes in (left, right):
        axes.legend()
    figure.suptitle(title)
    return figure


def main(argv: list[str] | None = None, size: Size | None = None) -> None:
    size, device = size or Size(), report.pick_device()
    parser = report.Parser("nanogpt_curves", "Train nanoGPT: causal against StableMask.")
    parser.add_argument("checkout", type=Path, help="folder of a nanoGPT checkout, which is only read")
    parser.text()
    parser.number("--steps", 800, f"of each run, down to a multiple of {VALIDATIONS}", least=VALIDATIONS)
    parser.number("--seeds", 3, "how many, from 0")
    parser.add_argument("--gamma", default="headwise", help="as the launcher takes it (default %(default)s)")
    args = parser.parse(argv)
    with parser.refusing(BadInput):
        if not (args.checkout / "train.py").is_file():
            raise ValueError(f"this is not a nanoGPT checkout: no train.py in {args.checkout}")
        parse_flags(["--attn=stablemask", f"--gamma={args.gamma}"])[0].gamma_for(size.n_head)
        text = read_text(args.text)
        commit = {"nanoGPT commit": report.commit(args.checkout)}
        result = report.Result(parser, args.out, "nanogpt", device, **commit)
    steps = args.steps // VALIDATIONS * VALIDATIONS
    runs = [Run(attn, seed) for seed in range(args.seeds) for attn in ("causal", "stablemask")]
    with tempfile.TemporaryDirectory() as folder, tqdm(total=steps * len(runs), unit="iter", dynamic_ncols=True) as bar:
        copy = Path(folder) / "nanoGPT"
        copy_checkout(args.checkout, copy, text)
        for run in runs:
            gamma = [] if run.attn == "causal" else [f"--gamma={args.gamma}"]
            with parser.refusing(RuntimeError):
                train(copy, run, [*options(size, steps, device), f"--attn={run.attn}", *gamma], bar)
    config = {**asdict(size), "steps": steps, "gamma": args.gamma, "text": text.name, "dropout": 0}
    title = f"nanoGPT on {text.name}: causal against StableMask, gamma {args.gamma}, {args.seeds} seeds"
    notes = (
        f"Validation loss at the end, nats per byte. {verdict(runs)}\n\n"
        f"Both runs of a seed have the same initial weights and batches. {report.listed(config)} "
        "Runs take turns, so where the machine has other work the times tell nothing."
    )
    record = {"runs": [asdict(run) for run in runs], "config": config}
    result.publish(title, table(runs), notes, record, {"": draw(runs, title)}, summary={"config": config})


if __name__ == "__main__":
    main()
