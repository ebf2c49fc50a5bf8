"""A tokenizer of single characters, and models to look at: small random ones, and one with a sink that was put there."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from tests.helpers.transformers_models import COMMON, VOCABULARY, model_of

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,;:!?\n"
BOS = 1
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "ran"] * 60
TEXT = "".join(f"{word}{end}" for word, end in zip(WORDS, " .,;!\n   " * 70, strict=False))


def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """ids 0 and 1 are the padding and BOS; with bos it is put before every text."""
    vocabulary = {"<pad>": 0, "<s>": BOS, **{c: i + 2 for i, c in enumerate(CHARACTERS)}}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = Split("", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    if bos:
        made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>")


def plain(config: Any) -> Any:
    """The same config without StableMask."""
    config.stablemask = None
    return config


def with_sink_at(token: int, attention: str = "sdpa") -> PreTrainedModel:
    """A Llama all of whose heads look at one token wherever it stands, and at all others alike.

    Its embedding has a direction of its own, which alone makes a key, in the two slowest dims of RoPE; queries are that key,
    whatever the token.
    """
    config = LlamaConfig(**{**COMMON, "max_position_embeddings": 512}, attention_bias=True)
    model: Any = model_of(plain(config), attention)
    head_dim = config.hidden_size // config.num_attention_heads
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[token] = 0
        model.model.embed_tokens.weight[token, 0] = 5
        for layer in model.model.layers:
            attention_layer = layer.self_attn
            for x in (attention_layer.q_proj.weight, attention_layer.k_proj.weight, layer.mlp.down_proj.weight):
                x.zero_()
            attention_layer.o_proj.weight.zero_()
            attention_layer.k_proj.bias.zero_()
            attention_layer.q_proj.bias.zero_()
            for head in range(config.num_attention_heads):
                slowest = head * head_dim + head_dim // 2 - 1
                attention_layer.q_proj.bias[slowest] = 5
                attention_layer.k_proj.weight[slowest, 0] = 5
    return model


def saved(folder: Path, model: Any, with_tokenizer: bool = True) -> Path:
    model.save_pretrained(folder)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return folder


assert len(CHARACTERS) + 2 <= VOCABULARY
