"""What a call of flash-attn asks for, checked, and what is refused by name."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sm_flex.checks.fits import check_is_stablemask
from sm_flex.checks.mask import check_sink
from sm_flex.checks.tensors import check_dropout, check_scale
from sm_flex.runtime import check_no_transform
from sm_flex.score_mod import StableMask

# Keywords that FlashAttention 3 and 4 have beyond FlashAttention 2's, and the values that ask for nothing. And
# dropout_p, for flash_attn_with_kvcache, which has none.
NEWER: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("qv", "q_descale", "k_descale", "v_descale", "pack_gqa", "num_heads_q"), (None,)),
    **dict.fromkeys(("seqused_q", "seqused_k", "page_table", "cu_seqlens_q", "cu_seqlens_k_new"), (None,)),
    **dict.fromkeys(("max_seqlen_q", "rotary_seqlens", "scheduler_metadata", "s_aux", "min_seqlen_k"), (None,)),
    **dict.fromkeys(("gather_kv_indices", "score_mod_bwd", "mask_mod", "aux_tensors", "aux_scalars"), (None,)),
    **dict.fromkeys(("block_sparse_tensors", "block_sparse_tensors_bwd", "seqlen_k_per_split"), (None,)),
    **dict.fromkeys(("attention_chunk", "sm_margin"), (None, 0)),
    **dict.fromkeys(("return_lse", "disable_scheduler_metadata"), (None, False)),
    "num_splits": (None, 0, 1),
    "dropout_p": (None, 0, 0.0),
}
WAYS_OUT = {
    "block_table": "gather the pages first",
    "page_table": "gather the pages first",
    "mask_mod": "use sm_flex.flex_attention with a block_mask",
    "return_attn_probs": "for the log-sum-exp use flash_attn_with_kvcache(..., return_softmax_lse=True), or "
    "sm_flex.flex_attention; for the weights sm_flex.diagnostics.attention_map",
    "return_lse": "use flash_attn_with_kvcache(..., return_softmax_lse=True), or sm_flex.flex_attention",
    "rotary_cos": "rotate q and k before the call",
    "rotary_sin": "rotate q and k before the call",
    "s_aux": "pass learnable_sink=",
    "score_mod_bwd": "score_mod is a StableMask, which has its gradient",
}
FLOAT32 = torch.finfo(torch.float32)


class Request(NamedTuple):
    """A checked call. left, right: how many keys before and after its own slot a query sees, -1 for all.

    mask: the caller's StableMask; sink: a learnable_sink without one; slopes: of ALiBi, (H,) or (B, H).
    """

    scale: float | None
    left: int
    right: int
    softcap: float
    slopes: Tensor | None
    dropout_p: float
    mask: StableMask | None
    sink: Tensor | None

    @property
    def plain(self) -> bool:
        """No mass, and scores as they are."""
        return self.mask is None and self.sink is None and not self.changes_scores

    @property
    def changes_scores(self) -> bool:
        return self.softcap > 0 or self.slopes is not None or (self.mask is not None and self.mask.score_mod is not None)


def check_newer(function: str, given: Mapping[str, Any]) -> None:
    """Keywords of FlashAttention 3 and 4 may be there with the value that asks for nothing."""
    for name, x in given.items():
        if name not in NEWER:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        if not any(x is nothing or (type(x) is type(nothing) and x == nothing) for nothing in NEWER[name]):
            refuse(name, function)


def refuse(name: str, function: str) -> None:
    way_out = WAYS_OUT.get(name)
    raise NotImplementedError(f"{name} is not served by sm_flex's {function}: {way_out or 'leave it out'}")


def read(
    function: str,
    *,
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    deterministic: Any,
    score_mod: Any,
    learnable_sink: Any,
    newer: Mapping[str, Any],
) -> Request:
    """The request, once every option is seen to be of its kind and to be served."""
    check_no_transform()
    check_newer(function, newer)
    check_dropout(dropout_p)
    check_scale(softmax_scale)
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)) or softcap != softcap:
        raise TypeError(f"softcap must be a number, got {softcap!r}")
    if softcap > 0 and not FLOAT32.tiny <= softcap <= FLOAT32.max:
        raise ValueError(f"softcap must be within the range of float32, or 0 for none, got {softcap!r}")
    for name, flag in (("causal", causal), ("deterministic", deterministic)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {type(flag).__name__}")
    left, right = read_window(window_size)
    if score_mod is not None:
        check_is_stablemask(score_mod, function)
        if not causal:
            raise ValueError("causal must be True with a StableMask, got False: pass causal=True")
        if score_mod.score_mod is not None and (softcap > 0 or alibi_slopes is not None):
            name = "softcap" if softcap > 0 else "alibi_slopes"
            raise NotImplementedError(f"{name} beside a StableMask with a score_mod of its own: put both into that score_mod")
    sink = None
    if learnable_sink is not None:
        if score_mod is not None:
            raise ValueError("learnable_sink and score_mod must not both be given: use stablemask(..., sink=...)")
        sink = check_sink(learnable_sink)
        if sink.dim() != 1:
            raise ValueError(f"learnable_sink must be (H,), one value per query head, got shape {tuple(sink.shape)}")
    right = 0 if causal else right
    return Request(softmax_scale, left, right, float(softcap), alibi_slopes, float(dropout_p), score_mod, sink)


def read_window(window_size: Any) -> tuple[int, int]:
    """(left, right), -1 for no limit. flash-attn takes any negative number for that."""
    pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    whole = pair and all(isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool) for x in window_size)
    if not whole:
        raise ValueError(f"window_size must be (left, right), two ints, -1 for no limit, got {window_size}")
    left, right = [x if x >= 0 else -1 for x in window_size]
    return left, right


def check_tensors(layout: str, deterministic: bool, q: Any, k: Any, v: Any, names: tuple[str, str] = ("k", "v")) -> None:
    """q, k and v against each other; layout is "BSHD" or "THD"."""
    k_name, v_name = names
    for name, x in (("q", q), (k_name, k), (v_name, v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != len(layout):
            raise ValueError(f"{name} must be ({', '.join(layout)}), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got dtype {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"{v_name} must have the rows and heads of {k_name}, {tuple(k.shape[:-1])}, got {tuple(v.shape[:-1])}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{k_name} must have the head dim of q, {q.shape[-1]}, got {k.shape[-1]}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"the heads of q must be a multiple of those of {k_name}, got {q.shape[-2]} and {k.shape[-2]}")
    if deterministic and q.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        raise NotImplementedError(
            "deterministic is not an option of PyTorch's kernels on CUDA: call torch.use_deterministic_algorithms(True)"
        )


def check_stacked(name: str, x: Any, count: int, dims: int) -> tuple[Tensor, ...]:
    """The tensors that a packed form has stacked in the third last dimension."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != dims or x.shape[-3] != count:
        rows = "B, S" if dims == 5 else "T"
        raise ValueError(f"{name} must be ({rows}, {count}, H, D), got shape {tuple(x.shape)}")
    return x.unbind(-3)


def check_batch(name: str, x: Tensor, q: Tensor) -> None:
    if x.shape[0] != q.shape[0]:
        raise ValueError(f"{name} must have the batch size of q, {q.shape[0]}, got {x.shape[0]}")


def check_slopes(slopes: Any, batch: int, q: Tensor) -> None:
    """ALiBi's slopes: (H,) or (B, H), of float32 as in flash-attn, or float64."""
    if slopes is None:
        return
    if not isinstance(slopes, Tensor) or slopes.dtype not in (torch.float32, torch.float64):
        kind = slopes.dtype if isinstance(slopes, Tensor) else type(slopes).__name__
        raise TypeError(f"alibi_slopes must be a float32 tensor, got {kind}")
    heads = q.shape[-2]
    if slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(f"alibi_slopes must be ({heads},) or ({batch}, {heads}), got {tuple(slopes.shape)}")
    if slopes.device != q.device:
        raise ValueError(f"alibi_slopes must be on the device of q, {q.device}, got {slopes.device}")
