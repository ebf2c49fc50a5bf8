"""Configs for titan_driver.py, as torchtitan's --module titan_configs --config NAME finds them: its debug models, made small.

TITAN_DATA is the folder with a tokenizer (tok) and a text (text).
"""

import os
from pathlib import Path
from typing import Any

import torchtitan.models.deepseek_v3.config_registry as deepseek_registry
import torchtitan.models.gpt_oss as gpt_oss_models
import torchtitan.models.gpt_oss.config_registry as gpt_oss_registry
import torchtitan.models.kimi_k2_7 as kimi_models
import torchtitan.models.llama3.config_registry as llama3_registry
import torchtitan.models.muse_glimmer.config_registry as muse_registry
import torchtitan.models.qwen3.config_registry as qwen3_registry
from torchtitan.components.optimizer import default_adamw


def llama3() -> Any:
    return _small(llama3_registry.llama3_debugmodel())


def llama3_varlen() -> Any:
    return _small(llama3_registry.llama3_debugmodel_varlen_attn())


def qwen3() -> Any:
    return _small(qwen3_registry.qwen3_debugmodel())


def gpt_oss() -> Any:
    """With 8 of its 64 query heads, and two of its 8 key heads."""
    config: Any = gpt_oss_registry.gpt_oss_debugmodel()
    for i, layer in enumerate(config.model_spec.model.layers):
        old = layer.attention
        layer.attention = gpt_oss_models._make_gptoss_attn_config(
            dim=old.dim, layer_id=i, n_heads=8, n_kv_heads=2, sliding_window_size=old.sliding_window_size, rope=old.rope
        )
    return _with_experts(config)


def deepseek_v3() -> Any:
    return _with_experts(deepseek_registry.deepseek_v3_debugmodel())


def kimi_k2_7() -> Any:
    """Kimi on a text: its own config imports a library for images. The encoder of images stays, and gets none."""
    config = deepseek_registry.deepseek_v3_debugmodel()
    config.model_spec = kimi_models.model_registry("debugmodel")
    config.parallelism.spmd_backend = "spmd_types"  # as Kimi's own
    return _with_experts(config)


def muse_glimmer() -> Any:
    """The last two of its layers, one with a window and one with none."""
    config: Any = muse_registry.muse_glimmer_debugmodel()
    layers = config.model_spec.model.layers
    layers[:] = layers[2:4]
    return _small(config)


def _small(config: Any) -> Any:
    data = Path(os.environ["TITAN_DATA"])
    config.hf_assets_path, config.dataloader.dataset_path = str(data / "tok"), str(data / "text")
    config.optimizer, config.lr_scheduler.warmup_steps = default_adamw(lr=1e-2), 1
    training = config.training
    training.seq_len, training.local_batch_size, training.steps = 256, 2, 4
    config.debug.seed, config.validator.enable = 1, False
    layers = config.model_spec.model.layers
    del layers[2:]
    training.mixed_precision_param, training.disable_cuda_graphs = "float32", True
    return config


def _with_experts(config: Any) -> Any:
    """Experts compute in bf16 whatever is asked, and want the rest of the model to do so too."""
    config = _small(config)
    training = config.training
    training.mixed_precision_param, training.local_batch_size, training.steps = "bfloat16", 1, 2
    config.optimizer = default_adamw(lr=1e-3)
    for layer in config.model_spec.model.layers:
        if layer.moe is not None:
            layer.moe.routed_experts.inner_experts.hidden_dim = 256
    return config
