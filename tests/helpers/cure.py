"""Shared by the tests of benchmarks.cure: a tiny Llama with a tokenizer, and documents of its words."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.cure import sinks
from benchmarks.cure.model import load
from benchmarks.cure.text import Corpus
from benchmarks.cure.train import Size, TrainingRun
from benchmarks.cure.variants import BY_NAME

LAYERS, HEADS, KEY_HEADS, DIM = 2, 3, 1, 8
WORDS = [f"word{i}" for i in range(37)]
SMALL = Size(length=32, steps=5, warmup=2, save_every=2)
CPU = torch.device("cpu")


def write_model(folder: Path) -> Path:
    """Random weights, large enough for attention that is not uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1, hidden_size=HEADS * DIM, intermediate_size=32, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=512, tie_word_embeddings=True,
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "<unk>"])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


def write_text(folder: Path) -> Path:
    folder.mkdir()
    draw = random.Random(0)
    for i in range(20):
        (folder / f"{i}.txt").write_text(" ".join(draw.choices(WORDS, k=300)))
    return folder


def corpus() -> Corpus:
    """Document i counts up from 100 i, so that a token tells where it stands."""
    documents = [torch.arange(100 * i, 100 * i + 100, dtype=torch.int32) for i in range(9)]
    return Corpus("counting", documents[:6], documents[6:], "fingerprint")


def random_sinks() -> sinks.Sinks:
    draw = torch.Generator().manual_seed(1)
    shapes = [(LAYERS, HEADS), (LAYERS, KEY_HEADS, DIM)]
    level, value = (torch.randn(shape, generator=draw) for shape in shapes)
    return sinks.Sinks(level, value, torch.rand(shapes[0], generator=draw), torch.rand(shapes[0], generator=draw) / 10)


def run_of(name: str, model: Path, folder: Path, order: int = 0, size: Size = SMALL) -> TrainingRun:
    """On documents of the model's own tokens."""
    draw = torch.Generator().manual_seed(2)
    documents = [torch.randint(len(WORDS), (70,), generator=draw, dtype=torch.int32) for _ in range(7)]
    text = Corpus("random", documents[:5], documents[5:], "fingerprint")
    return TrainingRun(BY_NAME[name], order, size, text, model, random_sinks(), folder, CPU)


def tiny(folder: Path):
    return load(folder, CPU)
