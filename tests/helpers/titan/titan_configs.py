"""Configs for titan_driver.py, as torchtitan's --module titan_configs --config NAME finds them: its debug models, made small.

TITAN_DATA is the folder with a tokenizer (tok) and a text (text).
"""

import os
from pathlib import Path
from typing import Any

import torchtitan.models.llama3.config_registry as llama3_registry
import torchtitan.models.qwen3.config_registry as qwen3_registry
from torchtitan.components.optimizer import default_adamw


def llama3() -> Any:
    return _small(llama3_registry.llama3_debugmodel())


def llama3_varlen() -> Any:
    return _small(llama3_registry.llama3_debugmodel_varlen_attn())


def qwen3() -> Any:
    return _small(qwen3_registry.qwen3_debugmodel())


def _small(config: Any) -> Any:
    data = Path(os.environ["TITAN_DATA"])
    config.hf_assets_path, config.dataloader.dataset_path = str(data / "tok"), str(data / "text")
    config.optimizer, config.lr_scheduler.warmup_steps = default_adamw(lr=1e-2), 1
    training = config.training
    training.seq_len, training.local_batch_size, training.steps = 256, 2, 4
    training.mixed_precision_param, training.disable_cuda_graphs = "float32", True
    config.debug.seed, config.validator.enable = 1, False
    layers = config.model_spec.model.layers
    del layers[2:]
    return config
