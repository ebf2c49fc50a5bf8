"""A first real training: a small decoder learns the bytes of real text, plain causal against StableMask.

    python -m benchmarks.lm                      # Python's own standard library is the text; minutes on two CPU cores
    python -m benchmarks.lm --text my_folder --steps 1000 --gamma 0.5

Both variants start from the same weights, see the same batches in the same order, and take their steps in turn, so that a
busy machine slows both alike. Both run through the same code: causal is ``stablemask(math.inf, length=N)``, whose pseudo
scores -j * inf leave no mass, which is exactly plain causal attention. What differs is log M and nothing else.

The text is trained on as packed documents. Each document is a separator and then its bytes; documents are laid one after
another, and the line is cut into rows of N tokens, N being the training length that StableMask asks for:

    row 0   <sep> i m p o r t _ o s \n ...            N tokens of document 0
    row 1   ... ) \n <sep> d e f _ f ( ) : ...        the end of document 0, then document 1 from its start
    pos     0 1 2 3  0     1 2 3 4 5 6 7              restarts at each document and at each row

A batch is a few rows, flattened into T tokens, and ``sm_flex.varlen_attn`` keeps the documents apart: no token sees another
document, and the positions (of RoPE here, and of the mass inside varlen_attn) restart at 0 with each. A document longer than a
row continues in the next one as a piece by itself. The separator is read but never predicted, so the loss is nats a byte.

The validation text is other files than the training text. On a CPU a seed gives the same losses every time.

Shapes in names: T packed tokens of a batch, W width, H heads, D head dim, V = 256 bytes; R rows, L = N + 1 tokens of a row
with the target of its last.
"""

import hashlib
import json
import math
import shlex
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import report
from sm_flex import StableMask, headwise_gamma, stablemask, varlen_attn

BYTES, SEPARATOR = 256, 256
# Not text that anybody wrote by hand, or not part of every installation.
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "__pycache__"}
VALIDATION_PART = 10  # one file in ten


@dataclass(frozen=True)
class Size:
    """The model and its training. The defaults are for minutes on two CPU cores."""

    layers: int = 2
    width: int = 128
    heads: int = 4
    length: int = 256  # N
    rows: int = 2  # a batch: many small steps learn most from minutes
    validation_rows: int = 128
    validations: int = 10
    peak_lr: float = 3e-3


# Text


class Text(NamedTuple):
    """Documents of the training and of the validation, none in both."""

    training: list[bytes]
    validation: list[bytes]
    name: str


def read_text(path: Path | None) -> Text:
    """The files under path (Python's standard library if None), each distinct one once, split by file.

    Files are put in the order of their SHA-256, which is as good as random and the same on every machine, and the first
    tenth is for validation. A single file is split at nine tenths of its length. What is not UTF-8 is skipped.
    """
    root = Path(sysconfig.get_path("stdlib")) if path is None else path
    if not root.exists():
        raise ValueError(f"--text: no such file or folder: {root}")
    files = [root] if root.is_file() else [f for f in sorted(root.rglob("*")) if f.is_file()]
    if path is None:
        files = [f for f in files if f.suffix == ".py" and NOT_LIBRARY.isdisjoint(f.relative_to(root).parts)]
    documents = {}
    for file in files:
        content = file.read_bytes()
        if content and _is_utf8(content):
            documents[hashlib.sha256(content).hexdigest()] = content
    if not documents:
        raise ValueError(f"--text: nothing to read in {root}: give a file of UTF-8 text, or a folder of them")
    ordered = [documents[digest] for digest in sorted(documents)]
    name = f"Python {sys.version.split()[0]} standard library" if path is None else root.name
    if len(ordered) == 1:
        cut = len(ordered[0]) * (VALIDATION_PART - 1) // VALIDATION_PART
        return Text([ordered[0][:cut]], [ordered[0][cut:]], name)
    cut = math.ceil(len(ordered) / VALIDATION_PART)
    return Text(ordered[cut:], ordered[:cut], name)


def cut_rows(documents: list[bytes], length: int) -> Tensor:
    """(R, N + 1) int16: rows of N tokens of the documents laid one after another, each with the token that follows it."""
    # A separator has no byte of its own: hold a place for it, and name it once bytes have become integers.
    line = b"".join(b"\0" + document for document in documents)
    lengths = torch.tensor([1 + len(document) for document in documents])
    tokens = torch.frombuffer(bytearray(line), dtype=torch.uint8).to(torch.int16)
    tokens[lengths.cumsum(0) - lengths] = SEPARATOR
    return tokens.unfold(0, length + 1, length) if len(tokens) > length else tokens.new_empty(0, length + 1)


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


class Packed(NamedTuple):
    tokens_T: Tensor
    targets_T: Tensor
    positions_T: Tensor  # in its own document
    cu_seqlens: Tensor  # (documents + 1,) the first token of each document, and T


def pack(rows_RL: Tensor, device: torch.device) -> Packed:
    """Rows flattened into one batch. A document starts at each separator and, as a piece by itself, at each row."""
    rows_RL = rows_RL.to(device, torch.int64)
    tokens_T, targets_T = rows_RL[:, :-1].flatten(), rows_RL[:, 1:].flatten()
    starts_T = tokens_T == SEPARATOR
    starts_T[:: rows_RL.shape[1] - 1] = True
    index_T = torch.arange(len(tokens_T), device=device)
    positions_T = index_T - torch.where(starts_T, index_T, 0).cummax(0).values
    cu_seqlens = torch.cat([index_T[starts_T], index_T.new_tensor([len(tokens_T)])]).to(torch.int32)
    return Packed(tokens_T, targets_T, positions_T, cu_seqlens)


def batches(rows_RL: Tensor, per_batch: int, seed: int) -> Iterator[Tensor]:
    """Rows in random order, every row once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows_RL), generator=generator)
        for first in range(0, len(order) - per_batch + 1, per_batch):
            yield rows_RL[order[first : first + per_batch]]


# Model


class Attention(nn.Module):
    def __init__(self, size: Size, mask: StableMask) -> None:
        super().__init__()
        self.heads, self.length, self.mask = size.heads, size.length, mask
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)

    def forward(self, x_TW: Tensor, rope: tuple[Tensor, Tensor], cu_seqlens: Tensor) -> Tensor:
        q_THD, k_THD, v_THD = self.qkv(x_TW).unflatten(1, (3, self.heads, -1)).unbind(1)
        # The whole of StableMask: score_mod in a call that is otherwise torch's own.
        out_THD = varlen_attn(
            rotate(q_THD, rope), rotate(k_THD, rope), v_THD, cu_seqlens, cu_seqlens, self.length, self.length,
            window_size=(-1, 0), score_mod=self.mask,
        )  # fmt: skip
        assert isinstance(out_THD, Tensor)
        return self.out(out_THD.flatten(1))


class SwiGLU(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        hidden = 8 * size.width // 3
        self.gate_up = nn.Linear(size.width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, size.width, bias=False)

    def forward(self, x_TW: Tensor) -> Tensor:
        gate, up = self.gate_up(x_TW).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, size: Size, mask: StableMask) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.RMSNorm(size.width, eps=1e-6), Attention(size, mask)
        self.norm_2, self.mlp = nn.RMSNorm(size.width, eps=1e-6), SwiGLU(size)
        # Each block starts as the identity.
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(self.mlp.out.weight)

    def forward(self, x_TW: Tensor, rope: tuple[Tensor, Tensor], cu_seqlens: Tensor) -> Tensor:
        x_TW = x_TW + self.attention(self.norm_1(x_TW), rope, cu_seqlens)
        return x_TW + self.mlp(self.norm_2(x_TW))


class Decoder(nn.Module):
    """Bytes and the separator in, scores of the next byte out. Its first loss is ln 256: the head starts at 0."""

    def __init__(self, size: Size, mask: StableMask) -> None:
        super().__init__()
        self.head_dim = size.width // size.heads
        self.embed = nn.Embedding(BYTES + 1, size.width)
        self.blocks = nn.ModuleList(Block(size, mask) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width, eps=1e-6)
        self.head = nn.Linear(size.width, BYTES, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, batch: Packed) -> Tensor:
        x_TW = self.embed(batch.tokens_T)
        rope = rope_table(batch.positions_T, self.head_dim)
        for block in self.blocks:
            x_TW = block(x_TW, rope, batch.cu_seqlens)
        return self.head(self.norm(x_TW))

    def loss(self, batch: Packed) -> Tensor:
        """Mean nats a byte."""
        logits_TV = self(batch)
        return F.cross_entropy(logits_TV.float(), batch.targets_T, ignore_index=SEPARATOR)


def rope_table(positions_T: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin (T, 1, D/2) of RoPE's angles."""
    rates = 10000.0 ** -torch.linspace(0, 1, head_dim // 2 + 1, device=positions_T.device)[:-1]
    angles = positions_T[:, None, None] * rates
    return angles.cos(), angles.sin()


def rotate(x_THD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    a, b = x_THD.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


# Training


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
            bar.set_postfix_str(f"nats/byte {losses}; {rate:,.0f} tokens/s", refresh=False)
            bar.update()


# Results


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
    left.set(xlabel="training steps", ylabel="loss (nats a byte)", yscale="log")
    left.legend(title="validation (training: thin)")
    causal, other = (dict(variant.validation) for variant in variants)
    right.plot(list(causal), [other[step] - causal[step] for step in causal], color="tab:blue", marker="o", markersize=4)
    right.axhline(0, color="tab:gray", linestyle="--")
    right.set(xlabel="training steps", ylabel="validation loss minus causal's (nats a byte)")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_gamma(text: str, heads: int) -> float | Tensor:
    if text == "headwise":
        return headwise_gamma(heads)
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
    parser.add_argument("--steps", type=int, default=3600, help="steps of each variant (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default %(default)s)")
    parser.add_argument("--gamma", default="headwise", help="headwise, or a number for every head (default %(default)s)")
    parser.add_argument("--out", type=Path, default=report.OUT, help="folder for the results (default %(default)s)")
    args = parser.parse_args(argv)
    device = pick_device()
    try:
        if args.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {args.steps}")
        if not 0 <= args.seed < 2**63:
            raise ValueError(f"--seed must be in [0, 2**63), got {args.seed}")
        gamma = read_gamma(args.gamma, size.heads)
        text = read_text(args.text)
        training_RL, validation_RL = read_rows(text, size)
        stem = report.result_stem(report.out_folder(args.out), "lm", device)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    held_out = [pack(rows_RL, device) for rows_RL in validation_RL.split(16)]
    gamma = gamma.to(device) if isinstance(gamma, Tensor) else gamma
    variants = [
        new_variant("causal", math.inf, size, args.seed, device),
        new_variant("stablemask", gamma, size, args.seed, device),
    ]
    config = {
        **asdict(size), "steps": args.steps, "seed": args.seed, "gamma": args.gamma, "text": text.name,
        "training_files": len(text.training), "training_bytes": sum(map(len, text.training)),
        "validation_files": len(text.validation), "validation_bytes": sum(map(len, text.validation)),
        "parameters": sum(p.numel() for p in variants[0].model.parameters()),
    }  # fmt: skip
    print(
        f"{text.name}: {config['training_bytes']:,} bytes of {len(text.training)} files; validation: {len(text.validation)} files"
    )
    train(variants, training_RL, held_out, size, args.steps, args.seed)
    tokens = size.rows * size.length
    measured = {
        v.name: {"val_loss": v.validation[-1][1], "tokens_per_s": tokens / statistics.median(v.seconds)} for v in variants
    }
    for name, result in measured.items():
        print(f"{name:12s} validation {result['val_loss']:.4f} nats a byte   {result['tokens_per_s']:>9,.0f} tokens/s")
    record = {"benchmark": "lm", "variants": measured, "config": config}
    save(stem, variants, record, report.environment(shlex.join(["python", "-m", "benchmarks.lm", *argv]), device))
    print(f"wrote {stem}.png, .md and .json")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
