"""Models to absorb sinks from: one whose first token is a sink by construction, small random ones, and a tokenizer of letters."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tests.helpers.transformers_models import COMMON, CONFIGS, model_of

ROWS = (6, 24)
SINK = 1  # the token that is one


def causal(name: str = "llama-gqa", attention: str = "sdpa", **changes: Any) -> Any:
    config = CONFIGS[name]()
    config.stablemask = None
    for key, value in changes.items():
        setattr(config, key, value)
    return model_of(config, attention)


def with_a_sink(layers: int = 1) -> Any:
    """A Llama in which each head gives the token SINK one score from every row, and its value is the same wherever it stands.

    Its key has one direction more than the others', in dims that RoPE does not turn, which queries have by their bias.
    """
    config = LlamaConfig(
        **{**COMMON, "stablemask": None, "num_hidden_layers": layers}, num_key_value_heads=2, attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},
    )  # fmt: skip
    model = model_of(config, "sdpa")
    with torch.no_grad():
        inner: Any = model.model
        inner.embed_tokens.weight[:, 0] = 0
        inner.embed_tokens.weight[SINK] = 0
        inner.embed_tokens.weight[SINK, 0] = 1
        for layer in inner.layers:
            attention = layer.self_attn
            attention.q_proj.weight.mul_(0.5)
            for part, heads in ((attention.q_proj, 6), (attention.k_proj, 2)):
                part.bias.zero_()
                part.weight.view(heads, 8, -1)[:, 3] = 0  # a dim that does not turn
            attention.q_proj.bias.view(6, 8)[:, 3] = torch.linspace(0.5, 1.5, 6)
            attention.k_proj.weight[:, 0] = 0
            attention.k_proj.weight.view(2, 8, -1)[:, 3, 0] = 1.2
    return model


def begun(ids: Tensor) -> Tensor:
    """ids behind the token that is a sink."""
    return torch.cat([torch.full_like(ids[:, :1], SINK), ids.clamp(min=2)], 1)


def window(length: int, width: int, keep: int = 0) -> Tensor:
    i, j = torch.arange(length)[:, None], torch.arange(length)
    return ((j <= i) & ((i - j < width) | (j < keep)))[None, None]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character."""
    letters = {c: i + 2 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz .,\n")}
    made = Tokenizer(WordLevel({"<pad>": 0, "<s>": SINK, **letters}, unk_token="<pad>"))
    made.pre_tokenizer = Split("", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")


def saved(folder: Path, model: Any, with_tokenizer: bool = True) -> Path:
    model.save_pretrained(folder)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return folder
