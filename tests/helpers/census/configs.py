"""A small config of any model type of Transformers, made from the type's own default config by the names of its fields."""

import re
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING

from tests.helpers.transformers_models import VOCABULARY, WINDOW

HEADS, KEY_VALUE_HEADS, HEAD_DIM = 4, 2, 8
HIDDEN = HEADS * HEAD_DIM

# Integers by the ends of their fields' names (a prefix may stand before them): the first pattern that matches counts. Other
# fields, and those that are smaller already, keep their defaults.
SIZES: list[tuple[int, str]] = [
    (VOCABULARY, r"vocab_size(_.*)?|vocab"),
    (64, r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions|context_length|model_max_length"),
    (KEY_VALUE_HEADS, r"num_key_value_heads|num_kv_heads|num_query_groups"),
    (16, r"index_n_heads"),  # enough that no score of an indexer, a sum of relus, ties at 0
    (HEADS, r"attention_heads|n_heads?|num_heads|num_(key|value)_heads|mamba_heads"),
    (2 * HEAD_DIM, r"qk_head_dim"),
    (HEAD_DIM, r"d_head|dim_head|head_dim|headdim|head_size|kv_channels|attention_head_dim"),
    (48, r"intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|ffn_size|dff|dim_ff|d_inner|mlp_dim|feed_forward_size"),
    (HIDDEN, r"hidden_size(_global|_per_layer_input)?|hidden_dim|d_model|n_embd|emb_dim|embedding_dim|embedding_size|embed_dim"),
    (HIDDEN, r"lru_width|proj_dim|output_dim|adapter_(in|out)_dim|adapter_input_size"),
    (4, r"num_experts|n_routed_experts|num_local_experts|zero_expert_num"),
    (2, r"num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts"),
    (1, r"n_group|topk_group|num_expert_group"),
    (2, r"n_?groups"),
    (4, r"rotary_dim|index_topk"),
    (8, r"rank|lowrank|d_rel|d_state|state_size|chunk_size"),
    (WINDOW, r"sliding_window(_size)?|window_size|attention_chunk_size|local_attention|rel_extent"),
    (2, r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers"),
]
# Fields that are set even where the default config leaves them None, and its models cannot.
FILLED = (
    "num_key_value_heads", "head_dim", "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts",
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "n_group", "topk_group",
)  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}

_SHARED_LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
# What the names do not say: by model type, arguments of its config.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "laguna": {"num_attention_heads_per_layer": [4, 8, 4]},
    "longcat_flash": {"qk_head_dim": 16},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_DIM},
    "minimax_m3_vl_text": {"index_block_size": 4, "index_topk_blocks": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "dory": {"n_input_layers": 2, "n_recurrent_layers": 1, "n_output_layers": 1, "num_hidden_layers": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "clip_text_model": {"eos_token_id": 2},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": KEY_VALUE_HEADS, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "num_key_value_heads": HEADS, "head_dim": 16, "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    },
    "gemma3n_text": {**_SHARED_LAYERS, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [48] * 4},
    "gemma4_text": {**_SHARED_LAYERS, "global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm5_next_text": {"index_kpool": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4, "indexer_compress_ratio": 2,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
}  # fmt: skip


def model_types() -> list[str]:
    """Every causal language model type, and the text models inside composite ones."""
    composite: Any = CONFIG_MAPPING.values()
    parts = [config.sub_configs.get("text_config") for config in composite]
    text = {part.model_type for part in parts if part in MODEL_MAPPING and part not in MODEL_FOR_CAUSAL_LM_MAPPING}
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *sorted(text)]


def fields_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that a config of this class takes, by the values that they have in this config."""
    if getattr(config, "is_heterogeneous", False):
        config.allow_global_per_layer_attribute_access = True  # pyright: ignore[reportAttributeAccessIssue]
    return {name: getattr(config, name) for name in type(config).__dataclass_fields__ if hasattr(config, name)}


def shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments that make a small config of the same class."""
    fields: dict[str, Any] = fields_of(config)
    given: dict[str, Any] = {}
    per_layer = _layers_of_each_kind(fields, getattr(config, "num_hidden_layers", None))
    for name, value in fields.items():
        if name in TOKENS:
            given[name] = TOKENS[name]
        elif isinstance(value, PreTrainedConfig):
            given[name] = {**shrunk(value), "model_type": value.model_type}
        elif isinstance(value, dict) and "rope_type" in value:  # models of several position axes share out the angles
            half = int(HEAD_DIM * value.get("partial_rotary_factor", 1.0)) // 2
            given[name] = value | {"mrope_section": [half - half // 4 * 2, half // 4, half // 4]}
        elif isinstance(value, int) and not isinstance(value, bool):
            given |= {name: _size(name)} if value > _size(name, value) else {}
        elif value is None and name in FILLED:
            given[name] = _size(name)
    if fields.get("kv_lora_rank") or fields.get("qk_nope_head_dim"):  # latent keys: as many heads as queries
        given["num_key_value_heads"] = HEADS
    if per_layer:
        layers = type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
        given |= per_layer | {layers: len(next(iter(per_layer.values())))}
    return given | SPECIAL.get(config.model_type, {})


def _size(name: str, default: int = 0) -> int:
    return next((size for size, names in SIZES if re.fullmatch(rf"(.*_)?({names})", name)), default)


def _layers_of_each_kind(fields: dict[str, Any], layers: int | None) -> dict[str, list[Any]]:
    """Lists with an entry for each layer, cut to the first two layers of each kind."""
    lists = {name: list(x) for name, x in fields.items() if isinstance(x, (list, tuple)) and len(x) == layers}
    lists = {name: x for name, x in lists.items() if len(set(map(str, x))) < len(x)}  # not the numbers of the layers
    kinds = [str(kind) for kind in zip(*lists.values(), strict=True)]
    chosen = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < 2]
    return {name: [x[i] for i in chosen] for name, x in lists.items()}


def small_config(model_type: str) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """A small config of this type, or of the part of it that the model takes; and the model."""
    config_class = CONFIG_MAPPING[model_type]
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING if config_class in MODEL_FOR_CAUSAL_LM_MAPPING else MODEL_MAPPING
    model_class = known[config_class]
    config = config_class(**shrunk(config_class()))
    parts = [config, *(getattr(config, name) for name in config.sub_configs)]
    config = next((part for part in parts if isinstance(part, model_class.config_class)), config)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config, model_class
