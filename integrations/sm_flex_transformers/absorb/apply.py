"""absorb_sinks(): the measured sinks into the model's config."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sm_flex import length_from
from sm_flex_transformers import settings
from sm_flex_transformers.absorb.learned import learn_sinks
from sm_flex_transformers.absorb.measure import Sinks, measure
from sm_flex_transformers.interface import check_looks_up, has_sinks

ROWS = (64, 256)


def absorb_sinks(
    model: PreTrainedModel,
    texts: Sequence[str] | Sequence[Tensor] | Tensor,
    *,
    tokenizer: Any = None,
    rows: tuple[int, int] = ROWS,
    length: int | None = None,
    learned: bool = False,
) -> Sinks:
    """Gives a pretrained causal model a sink in its config, for each head the level and for each key head the value of its own.

    A pretrained model's sink is its first token: much of every row goes to it, and its value is a constant that the model
    needs. Measured on a few texts, it is written as ``config.stablemask = {"gamma": inf, "length": N, "sink": layers by heads,
    "sink_value": layers by key heads by Dv}``, None for a layer with a sliding window; the model then runs
    ``attn_implementation="stablemask"``. Nothing is trained. What it is for: the first token may leave a window, or a cache.

    Args:
        model: a causal model of Transformers, with any attention of its interface. One that has StableMask's gamma keeps it,
            and its length.
        texts: strings, (S,) tensors of token ids, or a (B, S) tensor; 4 to 8 are enough. Of each the first rows[1] tokens are
            read.
        tokenizer: the model's, for strings. It begins each text as it begins any.
        rows: the rows over which a head's mean share is taken, as of :func:`sm_flex.diagnostics.sink_level`.
        length: N. config.max_position_embeddings where None. Without a gamma nothing depends on it.
        learned: make the sinks parameters of the model (:func:`learn_sinks`).

    Returns:
        What was measured: level, value and share of each layer.

    Raises:
        TypeError, ValueError: a model that was absorbed already, or has learned sinks of its own; a text too short for rows;
            strings without a tokenizer.
        NotImplementedError: an encoder, or a layer that cannot be read; it is named.
    """
    check_model(model)
    if length is not None:
        length = length_from(length)
    read = _token_ids(texts, tokenizer, rows)
    found = measure(model, read, rows)
    config: Any = model.config.get_text_config()
    given = {"gamma": float("inf"), **(settings.of(config) or {})}
    if length is None:
        length = given.get("length", getattr(config, "max_position_embeddings", None))
    given |= {} if length is None else {"length": length}
    given |= {
        "sink": [None if x is None else x.tolist() for x in found.level],
        "sink_value": [None if x is None else x.float().tolist() for x in found.value],
    }
    model.config.stablemask = given  # pyright: ignore[reportAttributeAccessIssue]
    config.stablemask = given
    model.set_attn_implementation("stablemask")
    if learned:
        learn_sinks(model)
    return found


def check_model(model: Any) -> None:
    """Raises what absorb_sinks() refuses of a model before it has read a text."""
    config = model.config.get_text_config()
    check_config(model.config)
    check_looks_up(type(model), "stablemask")
    if has_sinks(type(model)):
        raise ValueError(
            f"{type(model).__name__} has learned attention sinks of its own, which are a mass already: there is nothing to absorb"
        )
    if getattr(config, "is_heterogeneous", False):
        raise NotImplementedError(
            f"{type(model).__name__} has settings for each layer (per_layer_config): absorb_sinks writes one for the whole model"
        )


def check_config(config: Any) -> None:
    """The part of check_model() that a config alone tells."""
    given = settings.of(config) or settings.of(config.get_text_config()) or {}
    if given.get("sink") is not None:
        raise ValueError('the model was absorbed already: its config.stablemask has a "sink". Take it out to measure anew')
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"{config.model_type} is an encoder-decoder: absorb_sinks takes decoder-only causal models")


def _token_ids(texts: Any, tokenizer: Any, rows: tuple[int, int]) -> list[Tensor]:
    if isinstance(texts, str) or not isinstance(texts, (Sequence, Tensor)):
        raise TypeError(f"texts must be a list of strings or of token id tensors, got {type(texts).__name__}")
    if len(texts) == 0:
        raise ValueError("texts must hold at least one text, got none")
    found = []
    for number, text in enumerate(texts):
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError("tokenizer is required for texts that are strings: pass the model's, or tensors of token ids")
            text = torch.tensor(tokenizer(text, truncation=True, max_length=rows[1])["input_ids"])
        if not isinstance(text, Tensor) or text.dtype not in (torch.int32, torch.int64) or text.dim() != 1:
            got = f"{text.dtype} of shape {tuple(text.shape)}" if isinstance(text, Tensor) else type(text).__name__
            raise TypeError(f"texts must be strings or (S,) integer tensors of token ids, got {got} at {number}")
        if len(text) <= rows[0]:
            raise ValueError(
                f"text {number} has {len(text)} tokens: it must be longer than {rows[0]}, the first of the rows {rows} over "
                "which a sink is measured; give a longer text or other rows"
            )
        found.append(text[: rows[1]].long())
    return found
