"""Step time and memory of torchtitan's own trainer, with its causal attention and with StableMask. On a GPU:

    python -m benchmarks.titan_speed

The model is llama3 8B with --layers of its 32 layers, so that one GPU holds it with its optimizer; tokens are
random, packed into documents. Every training is a process of its own, whose peak memory is the attention's. The
two alternate, --repeats times. Everything else is torchtitan's default: flex compiled by itself, selective
checkpointing, CUDA graphs; --compile compiles the layers too. The figure to look at is the ratio of StableMask to causal.

On a CPU, where torch's flex cannot train, the debug model is taken, and gamma = inf is causal: a trial of
this script.
"""

import importlib.metadata
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils
from torch.utils.data import IterableDataset

from benchmarks import report
from sm_flex_torchtitan.versions import check_versions

WARM_UP = 5
DOCUMENT = 700  # the mean length
VARIANTS = ("causal", "StableMask")


def main(argv: list[str] | None = None) -> None:
    parser = report.Parser("titan_speed", "Step time and memory of torchtitan's trainer.")
    parser.number("--layers", 4, "of the model")
    parser.number("--length", 4096, "tokens in a row")
    parser.number("--batch", 1, "rows in a step")
    parser.number("--steps", 40, f"timed steps of each training, after {WARM_UP} others", least=2)
    parser.number("--repeats", 3, "trainings of each attention")
    parser.add_argument("--compile", action="store_true", help="the layers too")
    parser.add_argument("--train", choices=VARIANTS, help="what the processes are for: one training, whose figures are printed")
    args, device = parser.parse(argv), report.pick_device()
    with parser.refusing(ImportError):
        check_versions()
    if args.train:
        print(json.dumps(train(args)))
        return
    what = "titan-speed-compiled" if args.compile else "titan-speed"
    with parser.refusing():
        result = report.Result(parser, args.out, what, device, torchtitan=importlib.metadata.version("torchtitan"))
    ms: dict[str, list[float]] = {name: [] for name in VARIANTS}
    gib: dict[str, list[float]] = {name: [] for name in VARIANTS}
    command = [sys.executable, "-m", "benchmarks.titan_speed", *parser.argv, "--train"]
    for repeat in range(args.repeats):
        for name in VARIANTS if repeat % 2 == 0 else reversed(VARIANTS):
            done = subprocess.run([*command, name], capture_output=True, text=True, cwd=report.ROOT, check=False)
            if done.returncode:
                raise SystemExit(f"{name} stopped:\n{done.stderr[-4000:]}")
            figures = json.loads(done.stdout.splitlines()[-1])
            ms[name] += figures["ms"]
            gib[name].append(figures["gib"])
            print(f"{name}: {statistics.median(figures['ms']):.2f} ms, {figures['gib']:.3f} GiB", flush=True)
    rows = []
    for name in VARIANTS:
        found = report.median_and_fifths(ms[name])
        ratio = found["median"] / statistics.median(ms["causal"])
        spread = f"{found['p20']:.2f} to {found['p80']:.2f}"
        rows.append([name, f"{found['median']:.2f}", spread, f"{ratio:.4f}", f"{max(gib[name]):.3f}"])
    table = report.markdown_table(["attention", "ms per step, median", "p20 to p80", "of causal", "peak GiB"], rows)
    model = "llama3 8B" if device.type == "cuda" else "llama3's debug model, gamma = inf for causal"
    shape = f"{args.layers} layers, {args.batch} x {args.length} tokens per step, {args.steps} steps, {args.repeats} times"
    record = {name: {"ms": ms[name], "gib": gib[name]} for name in VARIANTS}
    result.publish("torchtitan's step, causal and StableMask", table, f"{model}, {shape}.", record, summary={"rows": rows})


def train(args: Any) -> dict[str, Any]:
    """One training by torchtitan's trainer: milliseconds of its steps, and its peak memory."""
    device = report.pick_device()
    on_gpu = device.type == "cuda"
    if not on_gpu:
        fill_in_torch_cpu()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    from torchtitan.config import CompileConfig
    from torchtitan.models.llama3 import config_registry

    config: Any = config_registry.llama3_8b() if on_gpu else config_registry.llama3_debugmodel()
    model, training = config.model_spec.model, config.training
    del model.layers[args.layers :]
    training.seq_len, training.local_batch_size, training.steps = args.length, args.batch, WARM_UP + args.steps
    config.dataloader, config.tokenizer = _random_documents(model.vocab_size), _no_tokenizer()
    config.compile, config.validator.enable = CompileConfig(enable=args.compile), False
    config.profiler.enable_profiling, config.metrics.enable_tensorboard = False, False
    config.dump_folder = tempfile.mkdtemp()
    if args.train == "StableMask":
        config.override.imports = ["sm_flex_torchtitan.overrides.stablemask"]
    elif not on_gpu:
        config.override.imports = [("sm_flex_torchtitan.overrides.stablemask", {"gamma": float("inf")})]
    trainer = config.build()
    batches = trainer.batch_generator(trainer.dataloader)
    ms = []
    for _ in range(training.steps):
        start = report.now(device)
        trainer.step += 1
        trainer.train_step(batches)
        ms.append(1e3 * (report.now(device) - start))
    trainer.close()
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return {"ms": ms[WARM_UP:], "gib": peak / 2**30}


def fill_in_torch_cpu() -> None:
    """What torch.cpu lacks for torchtitan's trainer; before torchtitan is imported."""
    torch._utils._get_available_device_type = lambda: "cpu"
    stats = ("active_bytes.all.peak", "reserved_bytes.all.peak", "num_alloc_retries", "num_ooms")
    missing: dict[str, Any] = {
        "set_device": lambda device: None,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: "cpu",
        "get_device_properties": lambda device=None: SimpleNamespace(total_memory=1 << 34),
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_stats": lambda device=None: dict.fromkeys(stats, 0),
    }
    for name, function in missing.items():
        setattr(torch.cpu, name, function)


class Documents(IterableDataset):
    """Rows of random tokens and the position of each in its document; a document starts at random."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            tokens = torch.randint(self.vocabulary, (self.length + 1,), generator=generator)
            starts = torch.rand(self.length, generator=generator) < 1 / DOCUMENT
            starts[0] = True
            slots = torch.arange(self.length)
            positions = slots - torch.where(starts, slots, 0).cummax(0).values
            yield {"input": tokens[:-1], "positions": positions}, tokens[1:]


def _random_documents(vocabulary: int) -> Any:
    from torchtitan.components.dataloader import ParallelAwareDataloader

    class Loader(ParallelAwareDataloader):
        @dataclass(kw_only=True, slots=True)
        class Config(ParallelAwareDataloader.Config):
            pass

        def __init__(self, config: Config, *, seq_len: int, local_batch_size: int, dp_rank: int, dp_world_size: int, **rest: Any):
            super().__init__(Documents(vocabulary, seq_len), dp_rank, dp_world_size, batch_size=local_batch_size)

    return Loader.Config()


def _no_tokenizer() -> Any:
    from torchtitan.components.tokenizer import BaseTokenizer

    class NoTokenizer(BaseTokenizer):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config: Config, *, tokenizer_path: str) -> None:
            super().__init__()

        encode: Any = None
        decode: Any = None
        get_vocab_size: Any = None

    return NoTokenizer.Config()


if __name__ == "__main__":
    main()
