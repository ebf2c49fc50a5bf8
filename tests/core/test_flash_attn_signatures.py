"""flash-attn's signatures, and for every keyword of them: it is honoured, or refused by name."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import sm_flex.flash_attn as flash_attn
from sm_flex import stablemask

# Read from flash_attn/flash_attn_interface.py of Dao-AILab/flash-attention at commit
# 0251105a2fb19d2957484b7f023cd8c115286ced (2.8.4). A name alone has no default.
OPTIONS = (
    "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None deterministic=False "
    "return_attn_probs=False"
)
SIGNATURES = {
    "flash_attn_func": f"q k v {OPTIONS}",
    "flash_attn_kvpacked_func": f"q kv {OPTIONS}",
    "flash_attn_qkvpacked_func": f"qkv {OPTIONS}",
    "flash_attn_varlen_func": f"q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {OPTIONS} block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {OPTIONS}",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {OPTIONS}",
    "flash_attn_with_kvcache": (
        "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None cache_batch_idx=None "
        "cache_leftpad=None block_table=None softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 "
        "rotary_interleaved=True alibi_slopes=None num_splits=0 return_softmax_lse=False"
    ),
}
# What FlashAttention 3 (hopper/flash_attn_interface.py) and 4 (flash_attn/cute/interface.py) have beyond it there, with
# the defaults; s_aux is that of forks of 3.
NEWER: dict[str, Any] = {
    "qv": None, "q_descale": None, "k_descale": None, "v_descale": None, "attention_chunk": 0, "num_splits": 1,
    "pack_gqa": None, "sm_margin": 0, "num_heads_q": None, "seqused_q": None, "seqused_k": None, "s_aux": None,
    "page_table": None, "cu_seqlens_k_new": None, "rotary_seqlens": None, "scheduler_metadata": None,
    "gather_kv_indices": None, "score_mod_bwd": None, "mask_mod": None, "aux_tensors": None, "aux_scalars": None,
    "block_sparse_tensors": None, "block_sparse_tensors_bwd": None, "min_seqlen_k": None, "seqlen_k_per_split": None,
    "disable_scheduler_metadata": False, "return_lse": False,
}  # fmt: skip
OURS = ("score_mod", "learnable_sink")

H, D = 4, 6
Q, K = torch.randn(2, 7, H, D), torch.randn(2, 7, 2, D)
CU = torch.tensor([0, 3, 7], dtype=torch.int32)
KV = torch.stack([K, K.flip(1)], dim=2)
QKV = torch.stack([Q, Q.flip(1), Q.flip(2)], dim=2)
DOCUMENTS = {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 4, "max_seqlen_k": 4}
REQUIRED: dict[str, dict[str, Any]] = {
    "flash_attn_func": {"q": Q, "k": K, "v": K.flip(1)},
    "flash_attn_kvpacked_func": {"q": Q, "kv": KV},
    "flash_attn_qkvpacked_func": {"qkv": QKV},
    "flash_attn_varlen_func": {"q": Q[0], "k": K[0], "v": K[1], **DOCUMENTS},
    "flash_attn_varlen_kvpacked_func": {"q": Q[0], "kv": KV[0], **DOCUMENTS},
    "flash_attn_varlen_qkvpacked_func": {"qkv": QKV[0], "cu_seqlens": CU, "max_seqlen": 4},
    "flash_attn_with_kvcache": {"q": Q[:, :2], "k_cache": K, "v_cache": K.flip(1)},
}
NEW = {"k": K[:, :2], "v": K[:, 3:5], "cache_seqlens": 2}
# A value for each keyword that asks for something, and what it needs beside it.
ASKS: dict[str, dict[str, Any]] = {
    "dropout_p": {"dropout_p": 0.5},
    "softmax_scale": {"softmax_scale": 2.0},
    "causal": {"causal": True},
    "window_size": {"window_size": (1, 1)},
    "softcap": {"softcap": 0.3},
    "alibi_slopes": {"alibi_slopes": torch.tensor([0.5, 1.0, 0.1, 2.0])},
    "k": NEW,
    "v": NEW,
    "cache_seqlens": {"cache_seqlens": 4},
    "cache_batch_idx": {"cache_batch_idx": torch.tensor([1, 0])},
    "cache_leftpad": {"cache_leftpad": torch.tensor([1, 2])},
    "return_softmax_lse": {"return_softmax_lse": True},
    "score_mod": {"score_mod": stablemask(0.3, length=9), "causal": True},
    "learnable_sink": {"learnable_sink": torch.zeros(H)},
}
REFUSED = {name: {name: torch.ones(1)} for name in ("rotary_cos", "rotary_sin", "block_table")}
REFUSED["return_attn_probs"] = {"return_attn_probs": True}  # pyright: ignore
# They choose how flash-attn's kernel computes, and change no number: all is deterministic on a CPU.
HINTS = {"deterministic": True, "num_splits": 3, "rotary_interleaved": False}


def call(function: str, **options: Any) -> Any:
    arguments = {name: x.clone() if isinstance(x, Tensor) else x for name, x in REQUIRED[function].items()}
    return getattr(flash_attn, function)(**{**arguments, **options})


@pytest.mark.parametrize("function", SIGNATURES)
def test_the_signature_is_flash_attns(function: str) -> None:
    parameters = inspect.signature(getattr(flash_attn, function)).parameters.values()
    ours = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}".replace(" ", "")
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert ours == SIGNATURES[function].split()
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == list(OURS)
    assert sorted(flash_attn.__all__) == sorted(SIGNATURES)


@pytest.mark.parametrize("function", SIGNATURES)
def test_every_keyword_is_honoured_or_refused(function: str) -> None:
    default = call(function)
    names = [name.split("=")[0] for name in SIGNATURES[function].split() if "=" in name]
    for name in (*names, *OURS):
        if name in REFUSED:
            with pytest.raises(NotImplementedError, match=rf"^{name} is not served by sm_flex's flash_attn_"):
                call(function, **REFUSED[name])
        elif name in HINTS:
            assert torch.equal(call(function, **{name: HINTS[name]}), default)
        else:
            ours = call(function, **ASKS[name])
            assert isinstance(ours, tuple) or not torch.allclose(ours, default), name


@pytest.mark.parametrize("function", SIGNATURES)
def test_keywords_of_newer_flash_attn_are_taken_with_their_default_and_refused_without(function: str) -> None:
    own = [name.split("=")[0] for name in SIGNATURES[function].split()]
    newer = {name: x for name, x in NEWER.items() if name not in own}
    assert torch.equal(call(function, **newer), call(function))
    for name, default in newer.items():
        asks = True if isinstance(default, bool) else torch.ones(1) if default is None else 7
        with pytest.raises(NotImplementedError, match=rf"^{name} is not served by sm_flex's flash_attn_"):
            call(function, **{name: asks})
    with pytest.raises(TypeError, match=r"flash_attn_\w+\(\) got an unexpected keyword argument 'causl'"):
        call(function, causl=True)


def test_a_cache_has_no_dropout() -> None:
    with pytest.raises(NotImplementedError, match="dropout_p is not served by sm_flex"):
        call("flash_attn_with_kvcache", dropout_p=0.1)
