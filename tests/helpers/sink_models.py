"""Small models whose config has sinks, and equation 11 with those sinks as one more attention implementation."""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sm_flex import headwise_gamma
from tests.helpers.transformers_models import CONFIGS, LENGTH, eq_11, full_mask, model_of

HEADS, KEY_HEADS, LAYERS, DIM = 6, 2, 2, 8  # of "llama-gqa"


def levels(*shape: int, seed: int = 7) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 1).tolist()


SINKS: dict[str, Any] = {"number": 1.25, "heads": levels(HEADS), "layers": levels(LAYERS, HEADS)}
VALUES: dict[str, Any] = {
    "none": None,
    "heads": levels(HEADS, DIM),
    "key heads": levels(KEY_HEADS, DIM),
    "layers by key heads": levels(LAYERS, KEY_HEADS, DIM),
    "layers by heads": levels(LAYERS, HEADS, DIM),
}


def setting(sink: str = "layers", value: str = "none", **more: Any) -> dict[str, Any]:
    """config.stablemask. more: gamma, where it is not to be left out."""
    made = {"length": LENGTH, "sink": SINKS[sink], **more}
    return made if VALUES[value] is None else {**made, "sink_value": VALUES[value]}


def with_sinks(given: dict[str, Any] | None, attention: str = "stablemask", name: str = "llama-gqa", **changes: Any) -> Any:
    config = CONFIGS[name]()
    config.stablemask = given
    for key, value in changes.items():
        setattr(config, key, value)
    return model_of(config, attention)


def sink_oracle(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """Equation 11 of a layer, with the sink of config.stablemask and the model's own, each a column of its own where both are."""
    asked, layer = module.config.stablemask, module.layer_idx
    gamma = asked.get("gamma", float("inf"))
    level = torch.tensor(asked["sink"], dtype=torch.float64)
    level = level[layer] if level.dim() == 2 else level.expand(query.shape[1])
    carried = None
    if asked.get("sink_value") is not None:
        carried = torch.tensor(asked["sink_value"], dtype=torch.float64)
        carried = carried[layer] if carried.dim() == 3 else carried
    own = given.get("s_aux")
    if own is not None:
        whole = torch.log(own.double().exp() + level.exp())
        if carried is not None:
            carried = carried.repeat_interleave(query.shape[1] // carried.shape[0], 0) * (level - whole).exp()[:, None]
        level = whole
    out = eq_11(
        query, key, value, gamma=headwise_gamma(query.shape[1]) if gamma == "headwise" else gamma, length=asked["length"],
        mask=attention_mask, scaling=given.get("scaling"), softcap=given.get("softcap"), position_ids=given.get("position_ids"),
        sink=level, sink_value=carried,
    )  # fmt: skip
    return out.to(query.dtype), None


AttentionInterface.register("sink_oracle", sink_oracle)
AttentionMaskInterface.register("sink_oracle", full_mask)


def gradients(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(ids, use_cache=False, **inputs).logits
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
