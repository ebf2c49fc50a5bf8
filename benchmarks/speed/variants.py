"""The variants of a case of benchmarks.speed: each a call (q, k, v) -> out of one engine.

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
from sm_flex.runtime import cpu_flash_op

PLAIN, STABLEMASK, AUTO, BASELINE = "plain causal", "StableMask", "StableMask, chosen", "baseline"
# The least that StableMask can cost on a kernel: the bare op and the epilogue's own ops, without any library.
FLOOR = "floor"
KERNEL = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Variant(NamedTuple):
    """gamma is headwise or zero, or empty where there is none; backward is False for one forward without gradients."""

    call: Call
    engine: str
    role: str
    gamma: str = ""
    backward: bool = True


class Setup(NamedTuple):
    """What the variants of a case share: positions and visibility of the rows, and the masks made of them."""

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

    @property
    def gqa(self) -> bool:
        return self.case.heads != self.case.kv_heads

    @property
    def window(self) -> tuple[int, int]:
        return (WINDOW - 1, 0) if self.case.kind == "window" else (-1, 0)

    def stablemask(self, gamma: str) -> Any:
        return stablemask(self.gammas[gamma], length=self.length, positions=self.positions, score_mod=self.score_mod)


def setup(case: Case, device: torch.device) -> Setup:
    lengths = document_lengths(case) if case.kind == "packed" else [case.length] * case.batch
    cu = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    gammas = {"headwise": headwise_gamma(case.heads).to(device), "zero": torch.zeros(case.heads, device=device)}
    positions = torch.cat([torch.arange(n, device=device) for n in lengths]) if case.kind == "packed" else None
    flex = any(engine.startswith("flex") or engine == "titan" for engine in case.engines)
    return Setup(
        case, device, gammas, max(lengths), lengths, positions, cu,
        _block_mask(case, lengths, device) if flex else None,
        _attn_mask(case, device) if device.type == "cpu" else None,
        _alibi(gammas["headwise"]) if case.kind == "alibi" else None,
    )  # fmt: skip


def variants(at: Setup) -> dict[str, Variant]:
    """By name, the plain one of an engine before StableMask on it."""
    found: dict[str, Variant] = {}
    for engine in at.case.engines:
        kernel = at.case.impl or engine if engine == "flash" else engine
        if engine in ("auto", "auto compiled"):
            found[f"StableMask, {engine}"] = Variant(_maybe_compiled(_ours_auto(at), engine), engine, AUTO, "headwise")
        elif engine == "titan":
            found["out * sigmoid(lse - m) on compiled flex"] = Variant(_titan(at), engine, BASELINE, "headwise")
        elif engine == "dense":
            found["dense formula"] = Variant(dense_formula(at), engine, BASELINE, "headwise")
        else:
            plain, ours = PAIR_OF.get(engine.removesuffix(" FLASH"), (_sdpa, _ours_sdpa))
            found[f"{kernel}, plain"] = Variant(_maybe_compiled(plain(at, engine), engine), engine, PLAIN)
            causal = at.case.group == "attention" and at.case.kind == "causal"
            zero_too = causal and engine in ("flash", "cudnn")
            for gamma in ("headwise", "zero") if zero_too else ("headwise",):
                name = f"{kernel}, StableMask" + ", gamma 0" * (gamma == "zero")
                found[name] = Variant(_maybe_compiled(ours(at, engine, gamma), engine), engine, STABLEMASK, gamma)
            if causal and engine == "cpu":
                found |= _without_gradients(at, found)
    return found


def _without_gradients(at: Setup, trained: dict[str, Variant]) -> dict[str, Variant]:
    """The pair again, forward alone without gradients, and what neither can beat; the floor of training has no backward."""
    plain, ours = trained["cpu, plain"], trained["cpu, StableMask"]
    free = "cpu, no gradients"
    return {
        "cpu, floor": Variant(floor(at, new_lse=True), "cpu", FLOOR, "headwise", False),
        f"{free}, plain": plain._replace(engine=free, backward=False),
        f"{free}, StableMask": ours._replace(engine=free, backward=False),
        f"{free}, floor": Variant(floor(at, new_lse=False), free, FLOOR, "headwise", False),
    }


def floor(at: Setup, new_lse: bool) -> Call:
    """The bare op and the epilogue's ops, the table in the op's own (S, H) memory; new_lse is what a backward would want."""
    table_HS = log_mass(at.gammas["headwise"], torch.arange(at.length), at.length).t().contiguous().t()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = cpu_flash_op(q, k, v, 0.0, True)
        share = (lse - table_HS).sigmoid()
        if new_lse:
            torch.logaddexp(lse, table_HS)
        return out.mul_(share.unsqueeze(-1).to(out.dtype))

    return call


def _maybe_compiled(call: Call, engine: str) -> Call:
    if engine.startswith("flex") or engine.endswith("compiled"):
        return torch.compile(call, dynamic=False, fullgraph=True)
    return call


def _sdpa(at: Setup, engine: str) -> Call:
    gqa, mask = at.gqa, at.attn_mask

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=gqa)

    def on_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(KERNEL[engine]):
            return call(q, k, v)

    return on_kernel if engine in KERNEL else call


def _ours_sdpa(at: Setup, engine: str, gamma: str) -> Call:
    gqa, visible, options = at.gqa, at.attn_mask, {"BACKEND": BACKEND_OF[engine]}
    if visible is None:
        mask = at.stablemask(gamma)
        return lambda q, k, v: flex_attention(q, k, v, score_mod=mask, enable_gqa=gqa, kernel_options=options)
    mask = stablemask(at.gammas[gamma], length=at.length)  # ALiBi is in visible
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, visible, score_mod=mask, enable_gqa=gqa)


def _ours_auto(at: Setup) -> Call:
    gqa, mask = at.gqa, at.stablemask("headwise")
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa, score_mod=mask)


def _flex(at: Setup, engine: str) -> Call:
    gqa, options = at.gqa, cast(Any, {"BACKEND": BACKEND_OF[engine]})
    score_mod, block_mask = at.score_mod, at.block_mask

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torch_flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=gqa, kernel_options=options)

    return call


def _ours_flex(at: Setup, engine: str, gamma: str) -> Call:
    gqa, mask, options = at.gqa, at.stablemask(gamma), {"BACKEND": BACKEND_OF[engine]}
    # A StableMask is causal by itself: only what narrows that is passed.
    block_mask = at.block_mask if at.case.kind in ("window", "packed") else None
    return lambda q, k, v: flex_attention(q, k, v, score_mod=mask, block_mask=block_mask, enable_gqa=gqa, kernel_options=options)


def _titan(at: Setup) -> Call:
    """torchtitan's way: an out_transform on compiled flex. log M is computed beforehand, and not counted."""
    gqa, block_mask = at.gqa, at.block_mask
    log_mass_HS = log_mass(at.gammas["headwise"], torch.arange(at.length, device=at.device), at.length)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, aux = torch_flex_attention(q, k, v, block_mask=block_mask, enable_gqa=gqa, return_aux=AuxRequest(lse=True))
        return out * torch.sigmoid(cast(Tensor, aux.lse) - log_mass_HS).unsqueeze(-1).to(out.dtype)

    return torch.compile(call, dynamic=False, fullgraph=True)


def dense_formula(at: Setup) -> Call:
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


def _varlen(at: Setup, engine: str) -> Call:
    if at.device.type == "cpu":
        return _one_by_one(at)
    return _packed(at, torch_varlen_attn)


def _ours_varlen(at: Setup, engine: str, gamma: str) -> Call:
    return _packed(at, varlen_attn, enable_gqa=at.gqa, score_mod=stablemask(at.gammas[gamma], length=at.length))


def _packed(at: Setup, varlen: Callable[..., Any], **options: Any) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packed = [rows_THD(x) for x in (q, k, v)]
        return like_BHSD(varlen(*packed, at.cu, at.cu, at.length, at.length, window_size=at.window, **options), q)

    return call


def _one_by_one(at: Setup) -> Call:
    """SDPA on each document: PyTorch has no packed attention on a CPU."""
    gqa = at.gqa

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(at.lengths, 2) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=gqa) for part in parts], 2)

    return call


PAIR_OF: dict[str, tuple[Callable[..., Call], Callable[..., Call]]] = {
    "varlen": (_varlen, _ours_varlen),
    "flex": (_flex, _ours_flex),
}


def rows_THD(x_BHSD: Tensor) -> Tensor:
    """A view: inputs lie in memory as (B, S, H, D)."""
    return x_BHSD.transpose(1, 2).flatten(0, 1)


def like_BHSD(x_THD: Tensor, q_BHSD: Tensor) -> Tensor:
    return x_THD.unflatten(0, (q_BHSD.shape[0], q_BHSD.shape[2])).transpose(1, 2)


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

    mask_mod = {"window": window, "packed": packed}.get(case.kind, causal)
    return create_block_mask(mask_mod, None, None, total, total, device=str(device))


def _attn_mask(case: Case, device: torch.device) -> Tensor | None:
    """A window or ALiBi as SDPA takes them on a CPU: (S, S) bool or (1, H, S, S) in the dtype of the call."""
    i = torch.arange(case.length, device=device).unsqueeze(1)
    j = torch.arange(case.length, device=device)
    if case.kind == "window":
        return (j <= i) & (i - j < WINDOW)
    if case.kind == "alibi":
        bias = headwise_gamma(case.heads).to(device).reshape(1, -1, 1, 1) * (j - i)
        return bias.masked_fill(j > i, -torch.inf).to(DTYPES[case.dtype])
    return None
