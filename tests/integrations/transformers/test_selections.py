"""Keywords of an attention call that StableMask does not know, and models that select the keys of each query themselves."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from sm_flex_transformers import keywords, stablemask_attention
from tests.helpers.transformers_models import COMMON, CONFIGS, agree, model_of, tokens

INF = {"gamma": float("inf"), "length": 16}  # the causal model
SPARSE: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "index_n_heads": 4, "index_head_dim": 16,
}  # fmt: skip


def model_type(name: str) -> Any:
    if not hasattr(transformers.models, name):
        pytest.skip(f"this Transformers has no {name}")
    return getattr(transformers.models, name)


def mistral_large4() -> Any:
    package = model_type("mistral_large4")
    config = package.configuration_mistral_large4.MistralLarge4TextConfig(**SPARSE, **LATENT, index_topk=4)
    config._experts_implementation, config.stablemask = "eager", INF
    return package.modeling_mistral_large4.MistralLarge4TextModel(config)


def minimax_m3() -> Any:
    package = model_type("minimax_m3_vl")
    config = package.configuration_minimax_m3_vl.MiniMaxM3VLTextConfig(
        **{**SPARSE, "num_key_value_heads": 2}, head_dim=8, num_local_experts=4, num_experts_per_tok=2, rotary_dim=4,
        index_n_heads=2, index_head_dim=8, index_block_size=2, index_topk_blocks=2, index_local_blocks=1,
        layer_types=["minimax_m3_sparse"] * 2, mlp_layer_types=["dense"] * 2, dense_intermediate_size=48,
    )  # fmt: skip
    config._experts_implementation, config.stablemask = "eager", INF
    return package.modeling_minimax_m3_vl.MiniMaxM3VLTextModel(config)


@pytest.mark.parametrize("make", [mistral_large4, minimax_m3])
@pytest.mark.parametrize("cache", [False, True])
def test_a_models_own_selection_of_keys_is_kept(make: Any, cache: bool) -> None:
    """At gamma = inf the model is its own sdpa model, indexer and all; and a gamma then moves it."""
    torch.manual_seed(0)
    model = make().double().eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(std=0.25)
    ids = torch.arange(2, 15)[None]

    @torch.no_grad()
    def hidden(attention: str) -> Tensor:
        model.set_attn_implementation(attention)
        return model(ids, use_cache=cache).last_hidden_state

    agree(hidden("stablemask"), hidden("sdpa"), 1e-6)  # parts of these models are float32
    dense = stand_in_for_all_keys(hidden)
    assert (hidden("sdpa") - dense).abs().max() > 1e-2
    model.config.stablemask = {"gamma": 0.05, "length": 64}
    assert (hidden("stablemask") - hidden("sdpa")).abs().max() > 1e-2


def test_a_selection_that_was_not_told_of_packed_documents_is_refused() -> None:
    """With a cache Transformers makes no mask for packed rows: an indexer would pick its keys from other documents too."""
    model, ids = mistral_large4().eval(), torch.arange(2, 15)[None]
    model.set_attn_implementation("stablemask")
    where = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        packed = model(ids, position_ids=where, use_cache=False).last_hidden_state
        for part in (slice(0, 6), slice(6, 13)):
            agree(packed[:, part], model(ids[:, part], use_cache=False).last_hidden_state, 1e-4)
        with pytest.raises(NotImplementedError, match="was not told of the packed documents in the row"):
            model(ids, position_ids=where)


def stand_in_for_all_keys(hidden: Any) -> Tensor:
    """The same forward with every key visible: what a swallowed selection gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keywords, "selected_keys", lambda *args: None)
        return hidden("stablemask")


def call(**kwargs: Any) -> Any:
    layer = model_of(CONFIGS["llama"]()).model.layers[0].self_attn
    q = torch.randn(1, 6, 5, 8)
    return stablemask_attention(layer, q, q, q, None, position_ids=torch.arange(5)[None], **kwargs)[0]


@pytest.mark.parametrize(
    ("keyword", "why"),
    [
        ({"tree_of_tokens": torch.ones(1)}, "LlamaAttention hands its attention tree_of_tokens=, which stablemask does not know"),
        ({"position_bias": torch.zeros(1, 3, 5, 5)}, r"has a bias on the scores \(position_bias\) of shape \(1, 3, 5, 5\)"),
        ({"position_bias": torch.zeros(5, 5)}, r"takes \(B, H, S, T\), here \(1, 6, 5, 5\)"),
        ({"position_bias": torch.zeros(1, 6, 5, 5), "softcap": 2.0}, "has soft-capping and a bias on the scores"),
        (
            {"indices": torch.zeros(5, dtype=torch.int32)},
            r"selects keys by indices of shape \(5,\): stablemask takes \(B, S, K\)",
        ),
        ({"block_indices": torch.zeros(1, 2, 5, 1, dtype=torch.long)}, r"has no indexer.build_block_mask"),
    ],
)
def test_a_keyword_that_carries_meaning_is_refused_by_name(keyword: dict[str, Tensor], why: str) -> None:
    with pytest.raises(NotImplementedError, match=why):
        call(**keyword)


def test_keywords_that_ask_for_nothing_change_nothing() -> None:
    torch.manual_seed(0)
    plain = call()
    torch.manual_seed(0)
    harmless = dict.fromkeys(keywords.HARMLESS, 1) | {"sliding_window": 5, "cu_seq_lens_q": None, "unknown": None, "other": False}
    assert torch.equal(call(**harmless), plain)


def test_indices_are_a_mask() -> None:
    torch.manual_seed(0)
    picked = torch.stack([torch.randperm(5)[:3] for _ in range(5)])[None]
    given = call(indices=picked.to(torch.int32))
    visible = torch.zeros(1, 5, 5, dtype=torch.bool).scatter(-1, picked, True).tril()[:, None]
    torch.manual_seed(0)
    torch.stack([torch.randperm(5)[:3] for _ in range(5)])
    layer = model_of(CONFIGS["llama"]()).model.layers[0].self_attn
    q = torch.randn(1, 6, 5, 8)
    agree(given, stablemask_attention(layer, q, q, q, visible, position_ids=torch.arange(5)[None])[0], 1e-6)


def test_a_wide_vocabulary_of_keywords_goes_through_a_real_forward() -> None:
    """What Transformers itself hands down in training with packed rows."""
    ids, where = tokens(1, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    lengths = torch.tensor([0, 4, 9], dtype=torch.int32)
    model = model_of(CONFIGS["llama"]())
    packed = model(
        ids, position_ids=where, labels=ids, num_items_in_batch=torch.tensor(8), cu_seq_lens_q=lengths, cu_seq_lens_k=lengths,
        max_length_q=5, max_length_k=5, output_hidden_states=True,
    )  # fmt: skip
    agree(packed.logits, torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], 1), 1e-5)
    assert COMMON["stablemask"] == model.config.stablemask
