"""The sizes of benchmarks.lm: the paper's Tables 5 and 6, and a tiny one for a CPU.

Table 5 does not say how it counts, and contradicts itself. One reading gives three of its four names: input
and output embeddings of their own, attention as wide as the embedding (its row "Hidden Size (Attention)" is
1x, 2x, 2x, 2x of that, and is left out), and an FFN as large as two matrices of embedding x hidden size,
which for SwiGLU is three of two thirds of it, as in LLaMA:

    71M    70.3 M parameters        160M   162 M        1.4B   1.41 B

No reading of its 400M column (16 layers of width 1024, FFN 2048) comes to 400 M; this one gives 237 M (the
paper's Table 1 calls the same model 430M). The column is kept as it is printed.

Table 6 goes by data set: 71M and 160M train as it says for WikiText-103, 400M as for MiniPile, 1.4B as for
the Pile.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A model and its training; tiny's values are the defaults."""

    layers: int = 4
    width: int = 96
    heads: int = 4
    hidden: int = 384  # of a two-matrix FFN; SwiGLU's three have two thirds of it
    vocab: int = 1024
    length: int = 256  # N
    rows: int = 4  # a batch: many small steps learn most from minutes
    at_once: int = 4  # rows in memory at a time; their gradients are summed
    steps: int = 700
    warmup: int = 35
    first_lr: float = 0.0
    peak_lr: float = 3e-3
    last_lr: float = 3e-4
    decay: str = "cosine"
    beta_2: float = 0.95
    weight_decay: float = 0.1
    # LLaMA's normal(0, 0.02), or "zero": the same but for output projections and head, so that each block starts as the identity.
    init: str = "normal"
    validation_rows: int = 128
    validations: int = 10
    long_texts: int = 16  # of 8 N tokens, for the extrapolation


_WIKITEXT = {
    "vocab": 50257, "length": 512, "rows": 64, "at_once": 16, "steps": 50_000, "warmup": 4000, "first_lr": 1e-6, "peak_lr": 6e-4,
    "last_lr": 0.0, "decay": "linear", "beta_2": 0.98, "weight_decay": 0.01, "validation_rows": 512, "validations": 50,
}  # fmt: skip
_MINIPILE = {**_WIKITEXT, "rows": 128, "steps": 44_000, "peak_lr": 4e-4}
_PILE = {
    **_WIKITEXT, "length": 1024, "rows": 128, "at_once": 4, "steps": 200_000, "first_lr": 5e-6, "peak_lr": 2e-4,
    "decay": "cosine", "weight_decay": 0.1,
}  # fmt: skip

PRESETS: dict[str, Size] = {
    "tiny": Size(),
    "71M": Size(layers=6, width=512, heads=8, hidden=2048, **_WIKITEXT),
    "160M": Size(layers=12, width=768, heads=12, hidden=3072, **_WIKITEXT),
    "400M": Size(layers=16, width=1024, heads=16, hidden=2048, **_MINIPILE),
    "1.4B": Size(layers=24, width=2048, heads=16, hidden=8192, **_PILE),
}


READING = (
    "Table 5 as read here: embeddings not shared with the head, attention as wide as they are, SwiGLU with the parameters of a "
    "two-matrix FFN; its 400M column then has 237 M (see benchmarks/lm/presets.py)"
)


def parameters(size: Size) -> int:
    """Of a model without learned sinks; separator and artificial token have embeddings of their own."""
    embeddings = (2 * size.vocab + 2) * size.width
    swiglu = 2 * size.hidden // 3
    layer = 4 * size.width**2 + 3 * size.width * swiglu + 2 * size.width
    return embeddings + size.layers * layer + size.width
