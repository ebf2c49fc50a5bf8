"""What a model's config asks of its attention, and what is refused of it before the weights are read."""

# pyright: reportMissingImports=false

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sm_flex_vllm import tables

# What proposes draft tokens without attention of its own, and a model, which is read by its own config.
DRAFTS = ("ngram", "ngram_gpu", "suffix", "draft_model")


class Layer(NamedTuple):
    """gamma of this rank's heads, N, and the levels of the config's sink, -inf for none."""

    gamma: tuple[float, ...]
    length: int
    sink: tuple[float, ...] | None = None


class Sink(NamedTuple):
    """A sink that carries a value, of this rank's heads: its level (H,) and value (H, Dv), float32."""

    level_H: Tensor
    value_HD: Tensor


class Settings:
    """The settings of a model's layers on this rank of its tensor parallel group.

    Raises:
        TypeError, ValueError: config.stablemask is wrong, in the words of the Transformers adapter, or its heads do not divide.
    """

    def __init__(self, vllm_config: Any) -> None:
        from sm_flex_transformers import settings as reader

        self._reader = reader
        self._rank, self._ranks = _tensor_parallel()
        model = vllm_config.model_config
        reader.hand_down_first(model.hf_config)
        self._config = model.hf_text_config
        self.num_layers = self._config.num_hidden_layers
        drafts = vllm_config.speculative_config
        self._size = model.max_model_len + (drafts.num_speculative_tokens or 0 if drafts else 0) + 1
        asked = [self._asked(layer) for layer in range(self.num_layers)]
        self.total_heads = {heads for heads, _ in asked}
        self.lengths = {layer.length for _, layer in asked}
        self.has_sink = any(layer.sink is not None for _, layer in asked)
        self.has_value = any(layer.sink_value is not None for _, layer in asked)
        self._value_dims = {None if layer.sink_value is None else layer.sink_value.shape[-1] for _, layer in asked}

    def check_value_dim(self, head_dim: int) -> None:
        """That some layer may have heads of this size, asked before a layer knows which one it is.

        Raises:
            ValueError: config.stablemask["sink_value"] is of another value head dim.
        """
        if not {None, head_dim} & self._value_dims:
            dims = " or ".join(str(dim) for dim in sorted(self._value_dims, key=str))
            raise ValueError(f'config.stablemask["sink_value"] must have {head_dim} numbers for each head, got {dims}')

    def layer(self, index: int, num_heads: int) -> Layer:
        """A layer's gammas and sinks: those of all heads, of which this rank takes its own num_heads."""
        total, asked = self._asked(index)
        if total != num_heads * self._ranks:
            raise ValueError(
                f"layer {index} has {total} query heads by the config, and vLLM serves {num_heads} on each of {self._ranks} "
                "tensor parallel ranks: StableMask cannot tell which heads are whose"
            )
        here = self._own_heads(num_heads)
        gamma, sink = (x if x is None else tuple(x.expand(total)[here].tolist()) for x in (asked.gamma, asked.sink))
        assert gamma is not None
        return Layer(gamma, asked.length, sink)

    def table(self, index: int, num_heads: int, device: torch.device) -> Tensor:
        """log M of a layer, (P, num_heads), a sink without a value included. Layers of the same settings share it."""
        gamma, length, sink = self.layer(index, num_heads)
        if self._asked(index)[1].sink_value is not None:
            sink = None  # the epilogue needs its mass apart
        return tables.table(gamma, length, sink, self._size, device)

    def sink(self, index: int, num_heads: int, head_dim: int, device: torch.device) -> Sink | None:
        """A layer's sink where it carries a value, of this rank's num_heads; None elsewhere.

        Raises:
            ValueError: the value is of another shape than the layer's heads.
        """
        total, asked = self._asked(index)
        if asked.sink_value is None:
            return None
        heads, dim = asked.sink_value.shape
        kv_heads = getattr(self._config, "num_key_value_heads", None) or total
        if heads not in (total, kv_heads) or dim != head_dim:
            raise ValueError(
                f'config.stablemask["sink_value"] of layer {index} must have {head_dim} numbers for each of its '
                f"{total} query heads or {kv_heads} key heads, got {dim} numbers for {heads} heads"
            )
        here = self._own_heads(num_heads)
        value_HD = asked.sink_value.repeat_interleave(total // heads, 0)[here]
        level_H = asked.sink.expand(total)[here]
        return Sink(*(x.to(device, torch.float32).contiguous() for x in (level_H, value_HD)))

    def _own_heads(self, num_heads: int) -> slice:
        return slice(self._rank * num_heads, (self._rank + 1) * num_heads)

    def _asked(self, index: int) -> tuple[int, Any]:
        """Heads of the whole model, and what config.stablemask asks of a layer; where that is nothing, a gamma of inf."""
        asked = self._reader.read(self._config, index, torch.device("cpu"))
        if asked is None:
            asked = self._reader.Settings(None, 1)
        if asked.gamma is None:
            asked = asked._replace(gamma=torch.tensor(math.inf, dtype=torch.float64))
        return self._reader.num_heads(self._config, index), asked

    def __str__(self) -> str:
        heads, lengths = (" to ".join(map(str, sorted({min(x), max(x)}))) for x in (self.total_heads, self.lengths))
        sinks = ", sinks with values" if self.has_value else ", sinks" if self.has_sink else ""
        return f"{heads} heads, N = {lengths}{sinks}"


def asks(model_config: Any) -> bool:
    """Whether a model's config has stablemask, in the whole, in its text or in one of its layers."""
    if model_config is None:
        return False
    configs = [model_config.hf_config, model_config.hf_text_config]
    for config in tuple(configs):
        if getattr(config, "is_heterogeneous", False):
            configs += config.per_layer_config
    return any(getattr(config, "__dict__", {}).get("stablemask") is not None for config in configs)


def check(vllm_config: Any, attn_type: str, alibi_slopes: Any) -> None:
    """Refuses what StableMask cannot do right in vLLM. Called for each layer when the model is built.

    Raises:
        NotImplementedError: naming what was asked for, and why it is refused.
    """
    model, parallel, drafts = vllm_config.model_config, vllm_config.parallel_config, vllm_config.speculative_config
    method = drafts.method if drafts else None
    refusals = {
        "an encoder or cross-attention: a StableMask is causal": attn_type != "decoder" or model.is_encoder_decoder,
        "latent attention (MLA): its backends do not serve it": model.use_mla,
        "positions of several axes (M-RoPE): the mass needs one position a token": model.uses_mrope
        or getattr(model, "uses_xdrope_dim", 0),
        "a prefix or an image that is seen whole (prefix-LM): a StableMask is causal": model.is_mm_prefix_lm,
        "a diffusion model: a StableMask is causal": model.is_diffusion,
        "attention without a causal mask (use_non_causal)": vllm_config.attention_config.use_non_causal,
        "attention in chunks of the sequence (attention_chunk_size): vLLM does not say where its rows are": _chunked(model),
        "a window beside a prefix (R-SWA)": model.rswa_window is not None,
        "context parallelism: a rank has a part of the keys, and vLLM merges the parts after the mass would be added": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "kv_sharing_fast_prefill: it leaves rows out, and vLLM does not say where the others are": (
            vllm_config.cache_config.kv_sharing_fast_prefill
        ),
        f"speculative decoding by {method}: its attention has no settings of its own": method not in (None, *DRAFTS),
        "ALiBi: no adapter trains a model with both": alibi_slopes is not None,
    }
    for what, asked in refusals.items():
        if asked:
            raise NotImplementedError(f"config.stablemask is set, and StableMask does not serve {what}")


def _chunked(model_config: Any) -> bool:
    return model_config.attention_chunk_size is not None


def _tensor_parallel() -> tuple[int, int]:
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
