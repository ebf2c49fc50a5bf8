"""The sinks of a model's layers, measured while it reads a few texts.

Dimension letters: L layers, H query heads of a layer, Hkv key heads, Dv value head dim.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sm_flex.diagnostics.sinks import SinkRows, level_of, sink_rows
from sm_flex_transformers.interface import layer_of
from sm_flex_transformers.look import calls


class Sinks(NamedTuple):
    """By layer, None where a layer has no attention or a sliding window, through which the first token leaves it anyway.

    level: (H,) float64, the log mass of each head's sink. value: (Hkv, Dv) float64, the first token's mean value. share: (H,)
    float64, the first token's mean share of the rows.
    """

    level: list[Tensor | None]
    value: list[Tensor | None]
    share: list[Tensor | None]


@torch.no_grad()
def measure(model: Any, texts: list[Tensor], rows: tuple[int, int]) -> Sinks:
    """The sinks of a model on texts of token ids, (S,) each.

    Raises:
        ValueError: the model called no attention that has a sink, or a head gives its first token everything.
        NotImplementedError: a layer that is not causal, or has what is not known here; it is named.
    """
    found = _Taken(rows)
    with calls.evaluating(model), calls.around_attention(found):
        for ids in texts:
            inputs = ids[None].to(model.get_input_embeddings().weight.device)
            model(input_ids=inputs, use_cache=False, **_last_row_only(model))
    return found.sinks(model)


def _last_row_only(model: Any) -> dict[str, int]:
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


class _Taken:
    """The attention function that keeps what the level of a sink follows from."""

    def __init__(self, rows: tuple[int, int]) -> None:
        self.rows = rows
        self.by_layer: dict[int, list[tuple[SinkRows, Tensor]]] = {}

    def __call__(self, attention: calls.Attention, module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise NotImplementedError(
                f"{layer_of(module)} does not know its number (layer_idx): its sink has no place in the config"
            )
        call = calls.read(module, *args, **kwargs)
        if not _slides(module, layer, kwargs):
            part = sink_rows(call.query, call.key, call.mask, rows=self.rows, scale=call.scale, visible=call.visible)
            self.by_layer.setdefault(layer, []).append((part, call.value[:, :, 0].double().cpu()))
        return attention(module, *args, **kwargs)

    def sinks(self, model: Any) -> Sinks:
        layers = range(model.config.get_text_config().num_hidden_layers)
        if not self.by_layer:
            raise ValueError(
                f"{type(model).__name__} has no layer of Transformers' attention interface that sees all keys: there is no sink "
                "to absorb"
            )
        level: list[Tensor | None] = []
        value: list[Tensor | None] = []
        share: list[Tensor | None] = []
        for layer in layers:
            taken = self.by_layer.get(layer)
            if taken is None:
                for part in (level, value, share):
                    part.append(None)
                continue
            rows = SinkRows(*(torch.cat(x).cpu() for x in zip(*(part for part, _ in taken), strict=True)))
            found = level_of(rows)
            level.append(found)
            value.append(torch.cat([first for _, first in taken]).mean(0))
            share.append(rows.share.mean((0, 2)))
            if not bool((found < torch.inf).all()):
                head = int(found.isposinf().nonzero()[0])
                raise ValueError(f"head {head} of layer {layer} gives its first token everything, which no mass can stand in for")
        return Sinks(level, value, share)


def _slides(module: Any, layer: int, given: dict[str, Any]) -> bool:
    types = getattr(module.config, "layer_types", None)
    return given.get("sliding_window") is not None or bool(types and layer < len(types) and "sliding" in types[layer])
