"""Small random decoders of Transformers in float64, and eq. 11 typed out as one more attention implementation."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers import __version__ as version
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import sm_flex_transformers  # noqa: F401  (registers stablemask and sm_flex)
from sm_flex import headwise_gamma
from sm_flex.testing import oracle

VOCABULARY, LENGTH = 61, 23  # N
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.3,
    "stablemask": {"gamma": "headwise", "length": LENGTH},
}  # fmt: skip
WINDOW = 7
CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON),
    "llama-gqa": lambda: LlamaConfig(**COMMON, num_key_value_heads=2),
    "mistral": lambda: MistralConfig(**COMMON, num_key_value_heads=3, sliding_window=WINDOW),
    "qwen3": lambda: Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON, num_key_value_heads=2, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt-neox": lambda: GPTNeoXConfig(**COMMON),
}
SOFT_CAPPED = Gemma2Config(
    **COMMON, num_key_value_heads=2, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=None,
    query_pre_attn_scalar=8,
)  # fmt: skip


def eq_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gamma: float | Tensor,
    length: int,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    position_bias: Tensor | None = None,
    sink: Tensor | None = None,
    sink_value: Tensor | None = None,
) -> Tensor:
    """Equation 11 of a layer's call (B, S, H, D); packed documents are apart wherever position_ids do not go up by 1.

    A float mask is of the model's own making: it says by itself who sees whom, and adds to the scores of what is seen.
    """
    by_the_model = mask is not None and mask.dtype != torch.bool
    visible, bias = mask, 0 if position_bias is None else position_bias
    if mask is not None and by_the_model:
        visible = mask > torch.finfo(mask.dtype).min
        bias = bias + mask.masked_fill(~visible, 0)
    if position_ids is not None and position_ids.dim() != 2:
        assert gamma == float("inf")  # no position counts
        position_ids = None
    if position_ids is not None:
        position_ids = position_ids[:, -query.shape[2] :]
        if query.shape[2] == key.shape[2] and not by_the_model:
            document = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
            same = document[:, None, :, None] == document[:, None, None, :]
            visible = same if visible is None else visible & same
    if softcap is not None:
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        bias = bias + torch.tanh(scores / softcap) * softcap - scores
    if not isinstance(bias, Tensor):
        bias = None
    out, _ = oracle(
        query,
        key,
        value,
        gamma=gamma,
        length=length,
        positions=position_ids,
        visible=visible,
        bias=bias,
        scale=scaling,
        sink=sink,
        sink_value=sink_value,
    )
    return out.transpose(1, 2).contiguous()


def oracle_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """Equation 11 with head-wise gamma, or inf, a model's own sinks, and the keys that its indexer selects."""
    setting = getattr(module.config, "stablemask", None) or COMMON["stablemask"]
    gamma = headwise_gamma(query.shape[1]) if setting["gamma"] == "headwise" else float("inf")
    assert setting["gamma"] in ("headwise", gamma)
    sinks = given["sinks"].squeeze(-1) if "sinks" in given else given.get("s_aux")
    indices, blocks = given.get("indices"), given.get("block_indices")
    if indices is not None:
        assert attention_mask is not None
        keys = torch.arange(key.shape[2])
        attention_mask = attention_mask & (indices[..., None] == keys).any(2)[:, None]
    if blocks is not None:
        attention_mask = module.indexer.build_block_mask(
            blocks, attention_mask, key.shape[2], query.dtype, query.device, given["position_ids"]
        )
    out = eq_11(
        query, key, value, gamma=gamma, length=setting["length"], mask=attention_mask,
        scaling=given.get("scaling"), softcap=given.get("softcap"), position_ids=given.get("position_ids"),
        position_bias=given.get("position_bias"), sink=sinks,
    )  # fmt: skip
    return out.to(query.dtype), None


def full_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register("oracle", oracle_attention)
AttentionMaskInterface.register("oracle", full_mask)


def agree(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def model_of(config: Any, attention: str = "stablemask", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    given = {"attn_implementation": attention, "experts_implementation": "eager"}  # the other experts know no float64
    return AutoModelForCausalLM.from_config(config, **given).double().eval()


def config_class(model_type: str) -> Any:
    """The config class of a model type; skips the test where the installed Transformers lacks it."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {version} has no model type {model_type}")
    return CONFIG_MAPPING[model_type]


def cache_name(model: PreTrainedModel) -> str:
    """The keyword that forward takes a cache under: "cache" from Transformers 5.24 on, "past_key_values" before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length))


def ragged(lengths: list[int], side: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Prompts of these lengths one by one, and all of them padded on that side, with mask and position_ids."""
    prompts, width = [tokens(1, n) for n in lengths], max(lengths)
    ids, mask = (torch.zeros(len(lengths), width, dtype=torch.long) for _ in range(2))
    for row, prompt in enumerate(prompts):
        n = prompt.shape[1]
        where = slice(width - n, None) if side == "left" else slice(0, n)
        ids[row, where], mask[row, where] = prompt[0], 1
    return prompts, {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
