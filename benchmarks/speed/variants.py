"""The variants of a case of benchmarks.speed: each a call (q, k, v) -> out of one engine, and what it is held against.

q (B, H, S, D), k and v (B, Hkv, S, D), out (B, H, S, D); packed documents are (1, H, T, D).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention
from torch.nn.attention.varlen import varlen_attn as torch_varlen_attn

from benchmarks.speed.cases import BACKEND_OF, DTYPES, WINDOW, Case, document_lengths
from benchmarks.speed.timing import Call
from sm_flex import flex_attention, headwise_gamma, log_mass, scaled_dot_product_attention, stablemask, varlen_attn

PLAIN, STABLEMASK, AUTO, RIVAL = "plain causal", "StableMask", "StableMask, chosen", "rival"
KERNEL = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Variant(NamedTuple):
    """gamma is headwise or zero, or empty where there is none."""

    call: Call
    engine: str
    role: str
    gamma: str = ""


class Setting(NamedTuple):
    """What the variants of a case share: positions and visibility of the T rows, and the masks made of them."""

    case: Case
    device: torch.device
    gammas: dict[str, Tensor]
    length: int
    lengths: list[int]
    positions: Tensor | None
    cu: Tensor
    block_mask: BlockMask | None
    attn_mask: Tensor | None
    score_mod: Callable[..., Tensor] | None


def setting(case: Case, device: torch.device) -> Setting:
    lengths = document_lengths(case) if case.kind == "packed" else [case.length] * case.batch
    cu = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    gammas = {"headwise": headwise_gamma(case.heads).to(device), "zero": torch.zeros(case.heads, device=device)}
    positions = torch.cat([torch.arange(n, device=device) for n in lengths]) if case.kind == "packed" else None
    flex = any(engine.startswith("flex") or engine == "titan" for engine in case.engines)
    score_mod = _alibi(gammas["headwise"]) if case.kind == "alibi" else None
    return Setting(
        case, device, gammas, max(lengths), lengths, positions, cu, _block_mask(case, lengths, device) if flex else None,
        _attn_mask(case, device) if device.type == "cpu" else None, score_mod,
    )  # fmt: skip


def variants(at: Setting) -> dict[str, Variant]:
    """By name, the plain one of an engine before StableMask on it."""
    found: dict[str, Variant] = {}
    for engine in at.case.engines:
        kernel = at.case.impl or engine if engine == "flash" else engine
        if engine in ("auto", "auto compiled"):
            call = _ours_auto(at, "headwise")
            found[f"StableMask, {engine}"] = Variant(_maybe_compiled(call, engine), engine, AUTO, "headwise")
        elif engine == "titan":
            found["out * sigmoid(lse - m) on compiled flex"] = Variant(_titan(at), engine, RIVAL, "headwise")
        elif engine == "dense":
            found["dense formula"] = Variant(_dense(at), engine, RIVAL, "headwise")
        else:
            plain, ours = PAIR_OF.get(engine, (_sdpa, _ours_sdpa))
            found[f"{kernel}, plain"] = Variant(_maybe_compiled(plain(at, engine), engine), engine, PLAIN)
            for rate in _rates(at.case, engine):
                name = f"{kernel}, StableMask" + ", gamma 0" * (rate == "zero")
                found[name] = Variant(_maybe_compiled(ours(at, engine, rate), engine), engine, STABLEMASK, rate)
    return found


def _rates(case: Case, engine: str) -> tuple[str, ...]:
    timed = case.group == "attention" and case.kind == "causal"
    return ("headwise", "zero") if timed and engine in ("flash", "cudnn", "cpu") else ("headwise",)


def _maybe_compiled(call: Call, engine: str) -> Call:
    if engine.startswith("flex") or engine.endswith("compiled"):
        return torch.compile(call, dynamic=False, fullgraph=True)
    return call


def _gqa(at: Setting) -> bool:
    return at.case.heads != at.case.kv_heads


def _mask(at: Setting, rate: str) -> Any:
    return stablemask(at.gammas[rate], length=at.length, positions=at.positions, score_mod=at.score_mod)


def _sdpa(at: Setting, engine: str) -> Call:
    gqa, mask = _gqa(at), at.attn_mask

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=gqa)

    def on_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(KERNEL[engine]):
            return call(q, k, v)

    return on_kernel if engine in KERNEL else call


def _ours_sdpa(at: Setting, engine: str, rate: str) -> Call:
    if at.attn_mask is not None:
        gqa, visible, mask = _gqa(at), at.attn_mask, stablemask(at.gammas[rate], length=at.length)
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, visible, score_mod=mask, enable_gqa=gqa)
    gqa, mask, options = _gqa(at), _mask(at, rate), {"BACKEND": BACKEND_OF[engine]}
    return lambda q, k, v: flex_attention(q, k, v, score_mod=mask, enable_gqa=gqa, kernel_options=options)


def _ours_auto(at: Setting, rate: str) -> Call:
    gqa, mask = _gqa(at), _mask(at, rate)
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa, score_mod=mask)


def _flex(at: Setting, engine: str) -> Call:
    gqa, options = _gqa(at), cast(Any, {"BACKEND": BACKEND_OF[engine]})
    score_mod, block_mask = at.score_mod, at.block_mask

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torch_flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=gqa, kernel_options=options)

    return call


def _ours_flex(at: Setting, engine: str, rate: str) -> Call:
    gqa, mask, options = _gqa(at), _mask(at, rate), {"BACKEND": BACKEND_OF[engine]}
    # A StableMask is causal by itself: only what narrows that is passed.
    block_mask = at.block_mask if at.case.kind in ("window", "packed") else None
    return lambda q, k, v: flex_attention(q, k, v, score_mod=mask, block_mask=block_mask, enable_gqa=gqa, kernel_options=options)


def _titan(at: Setting) -> Call:
    """torchtitan's way: an out_transform on compiled flex. log M is computed beforehand, and not counted."""
    gqa, block_mask = _gqa(at), at.block_mask
    log_mass_HS = log_mass(at.gammas["headwise"], torch.arange(at.length, device=at.device), at.length)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, aux = torch_flex_attention(q, k, v, block_mask=block_mask, enable_gqa=gqa, return_aux=AuxRequest(lse=True))
        return out * torch.sigmoid(cast(Tensor, aux.lse) - log_mass_HS).unsqueeze(-1).to(out.dtype)

    return torch.compile(call, dynamic=False, fullgraph=True)


def _dense(at: Setting) -> Call:
    """Equation 11 as it is printed, in plain PyTorch: (softmax(A * C + P) * C) V."""
    j = torch.arange(at.length, device=at.device)
    seen = j <= j.unsqueeze(1)
    pseudo_H1S = -(at.gammas["headwise"].reshape(-1, 1, 1) * j)
    repeats, scale = at.case.heads // at.case.kv_heads, at.case.head_dim**-0.5

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        scores = q @ k.transpose(-1, -2) * scale
        return (torch.where(seen, scores, pseudo_H1S.to(q.dtype)).softmax(-1) * seen) @ v

    return call


def _window(at: Setting) -> tuple[int, int]:
    return (WINDOW - 1, 0) if at.case.kind == "window" else (-1, 0)


def _varlen(at: Setting, engine: str) -> Call:
    if at.device.type == "cpu":
        return _one_by_one(at)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_THD, k_THD, v_THD = rows_THD(q), rows_THD(k), rows_THD(v)
        out = torch_varlen_attn(q_THD, k_THD, v_THD, at.cu, at.cu, at.length, at.length, window_size=_window(at))
        return like_BHSD(cast(Tensor, out), q)

    return call


def _ours_varlen(at: Setting, engine: str, rate: str) -> Call:
    mask, gqa = stablemask(at.gammas[rate], length=at.length), _gqa(at)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = varlen_attn(
            rows_THD(q), rows_THD(k), rows_THD(v), at.cu, at.cu, at.length, at.length,
            window_size=_window(at), enable_gqa=gqa, score_mod=mask,
        )  # fmt: skip
        return like_BHSD(cast(Tensor, out), q)

    return call


def _one_by_one(at: Setting) -> Call:
    """SDPA on each document: PyTorch has no packed attention on a CPU."""
    gqa = _gqa(at)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(at.lengths, 2) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=gqa) for part in parts], 2)

    return call


def rows_THD(x_BHSD: Tensor) -> Tensor:
    """A view: inputs lie in memory as (B, S, H, D)."""
    return x_BHSD.transpose(1, 2).flatten(0, 1)


def like_BHSD(x_THD: Tensor, q_BHSD: Tensor) -> Tensor:
    return x_THD.unflatten(0, (q_BHSD.shape[0], q_BHSD.shape[2])).transpose(1, 2)


PAIR_OF: dict[str, tuple[Callable[..., Call], Callable[..., Call]]] = {
    "varlen": (_varlen, _ours_varlen),
    "flex": (_flex, _ours_flex),
    "flex FLASH": (_flex, _ours_flex),
}


def _alibi(slopes: Tensor) -> Callable[..., Tensor]:
    return lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx)


def _block_mask(case: Case, lengths: list[int], device: torch.device) -> BlockMask:
    total = sum(lengths) if case.kind == "packed" else case.length
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)

    def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx >= kv_idx

    def window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) & (q_idx - kv_idx < WINDOW)

    def packed(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) & (document[q_idx] == document[kv_idx])

    mods = {"window": window, "packed": packed}
    return create_block_mask(mods.get(case.kind, causal), None, None, total, total, device=str(device))


def _attn_mask(case: Case, device: torch.device) -> Tensor | None:
    """On a CPU a window and ALiBi reach SDPA as a mask, (S, S) bool or (1, H, S, S) in the dtype of the call."""
    i = torch.arange(case.length, device=device).unsqueeze(1)
    j = torch.arange(case.length, device=device)
    if case.kind == "window":
        return (j <= i) & (i - j < WINDOW)
    if case.kind == "alibi":
        bias = headwise_gamma(case.heads).to(device).reshape(1, -1, 1, 1) * (j - i)
        return bias.masked_fill(j > i, -torch.inf).to(DTYPES[case.dtype])
    return None
