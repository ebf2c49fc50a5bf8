"""Loss curves of the real nanoGPT, plain causal against StableMask, by the launcher and over several seeds.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.nanogpt_curves nanoGPT        # Python's own standard library is the text; 15 minutes on one idle core

The checkout's scripts are copied to a temporary folder, the text becomes bytes in train.bin and val.bin there (files of the
validation are not those of the training), and nanoGPT's own train.py runs through ``python -m sm_flex_nanogpt``, once for
each attention and seed. nanoGPT has its seed in its code, so a config file, which its configurator runs as Python inside
train.py, puts another in its place.

Without dropout both attentions take the same random numbers: the same weights, and the same batches to train and to validate
on. What differs between the two curves of a seed is the attention.
"""

import json
import os
import pickle
import re
import shlex
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

from benchmarks import report
from benchmarks.lm.text import BYTES, Text, read_text
from sm_flex_launcher.flags import BadInput, parse_flags

PROG = "python -m benchmarks.nanogpt_curves"
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
    """One training: the losses that nanoGPT printed, in nats a byte."""

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
                bar.set_postfix_str(f"validation {run.validation[-1]:.3f} nats a byte", refresh=False)
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
    columns = ("seed", "causal", "StableMask", "StableMask minus causal", "ms an iteration, causal / StableMask")
    return report.markdown_table(columns, rows)


def verdict(runs: list[Run]) -> str:
    """What held, in figures: the final difference over the seeds."""
    differences = [ours.validation[-1] - causal.validation[-1] for causal, ours in pairs(runs)]
    lower = sum(d < 0 for d in differences)
    spread = f" ± {statistics.stdev(differences):.4f} (standard deviation over the seeds)" if len(differences) > 1 else ""
    return (
        f"StableMask ends lower for {lower} of {len(differences)} seeds; "
        f"StableMask minus causal: {statistics.fmean(differences):+.4f}{spread} nats a byte."
    )


def draw(runs: list[Run], path: Path, title: str) -> None:
    """Left: the validation loss of every run. Right: the difference within each seed."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, (causal, ours) in enumerate(pairs(runs)):
        labels = ("causal", "StableMask") if number == 0 else (None, None)
        left.plot(causal.steps, causal.validation, "--", color="tab:gray", marker="o", markersize=3, label=labels[0])
        left.plot(ours.steps, ours.validation, color="tab:blue", marker="o", markersize=3, label=labels[1])
        difference = [b - a for a, b in zip(causal.validation, ours.validation, strict=True)]
        right.plot(causal.steps, difference, marker="o", markersize=3, label=f"seed {causal.seed}")
    left.set(xlabel="iterations", ylabel="validation loss (nats a byte)")
    left.legend()
    right.axhline(0, color="tab:gray", linestyle="--")
    right.set(xlabel="iterations", ylabel="nats a byte")
    right.set_title("StableMask minus causal", fontsize=10)
    right.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None, size: Size | None = None) -> None:
    argv, size = sys.argv[1:] if argv is None else argv, size or Size()
    parser = report.Parser(prog=PROG, description="Train nanoGPT: causal against StableMask.")
    parser.add_argument("checkout", type=Path, help="folder of a nanoGPT checkout, which is only read")
    parser.add_argument("--text", type=Path, help="file or folder of UTF-8 text (default: Python's standard library)")
    parser.add_argument("--steps", type=int, default=800, help=f"of each run, down to a multiple of {VALIDATIONS}")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default %(default)s)")
    parser.add_argument("--gamma", default="headwise", help="as the launcher takes it (default %(default)s)")
    parser.add_argument("--out", type=Path, default=report.OUT, help="folder for the results (default %(default)s)")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        report.at_least("--steps", args.steps, VALIDATIONS)
        report.at_least("--seeds", args.seeds, 1)
        if not (args.checkout / "train.py").is_file():
            raise ValueError(f"this is not a nanoGPT checkout: no train.py in {args.checkout}")
        parse_flags(["--attn=stablemask", f"--gamma={args.gamma}"])[0].gamma_for(size.n_head)
        text = read_text(args.text)
        stem = report.result_stem(report.out_folder(args.out), "nanogpt", device)
    except (OSError, ValueError, BadInput) as error:
        parser.error(str(error))
    steps = args.steps // VALIDATIONS * VALIDATIONS
    runs = [Run(attn, seed) for seed in range(args.seeds) for attn in ("causal", "stablemask")]
    source = report.environment(shlex.join(["python", "-m", "benchmarks.nanogpt_curves", *argv]), device)
    source["nanoGPT commit"] = report.commit(args.checkout)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=steps * len(runs), unit="iter", dynamic_ncols=True) as bar:
        copy = Path(folder) / "nanoGPT"
        copy_checkout(args.checkout, copy, text)
        for run in runs:
            attention = [f"--attn={run.attn}"] if run.attn == "causal" else [f"--attn={run.attn}", f"--gamma={args.gamma}"]
            try:
                train(copy, run, [*options(size, steps, device), *attention], bar)
            except RuntimeError as error:
                parser.error(str(error))
    config = {**asdict(size), "steps": steps, "gamma": args.gamma, "text": text.name}
    record = {"benchmark": "nanogpt_curves", "runs": [asdict(run) for run in runs], "config": config}
    title = f"nanoGPT on {text.name}: causal against StableMask, gamma {args.gamma}, {args.seeds} seeds"
    draw(runs, stem.with_name(stem.name + ".png"), title)
    settings = ", ".join(f"{key} {value}" for key, value in config.items())
    notes = (
        f"Validation loss at the end, nats a byte. {verdict(runs)}\n\n![losses]({stem.name}.png)\n\n"
        f"Both runs of a seed have the same initial weights and batches. {settings}, dropout 0. Runs take turns, so where the "
        "machine has other work the times tell nothing."
    )
    report.write(stem, title, source, table(runs), notes, record)
    print(table(runs), verdict(runs), f"wrote {stem}.png, .md and .json", sep="\n")
    print(json.dumps({key: record[key] for key in ("benchmark", "config")}))


if __name__ == "__main__":
    main()
