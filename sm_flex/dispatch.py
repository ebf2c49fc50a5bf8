"""From a checked request to (out', lse'): pick the engine, hand it what it needs, run it.

identity.py runs the library kernels; torch's flex and the dense engine differentiate by themselves.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from sm_flex import _checks, identity, visibility
from sm_flex.engines import Call, Settings, dense, flex, rule, varlen
from sm_flex.mass import Mass
from sm_flex.remask import epilogue
from sm_flex.score_mod import StableMask

# Queries of a chunk against a cache that a CPU attends together, and elements of the bias that they share.
ROWS, BIAS_ELEMENTS = 512, 1 << 20


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: StableMask,
    *,
    scale: float | None,
    attn_mask: Tensor | None = None,
    block_mask: BlockMask | None = None,
    dropout_p: float = 0.0,
    backend: str = "AUTO",
    flex_options: dict[str, Any] | None = None,
    max_scores: bool = False,
    want_lse: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out' (B, H, S, Dv), lse' (B, H, S) if wanted, and the row maxima if wanted; attn_mask has four dimensions."""
    _checks.check_scale(scale)
    _checks.check_mask_fits(mask, q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device, block_mask)
    scale = score_scale(scale, q.shape[-1])
    need = rule.Need(
        score_mod=mask.score_mod is not None,
        block_mask=block_mask is not None,
        flex_options=bool(flex_options) or max_scores,
        dropout_p=dropout_p,
        lse_grad=want_lse and torch.is_grad_enabled(),
    )
    mass = mask.mass(q.device, q.shape[2], k.shape[2])
    with no_autocast(q.device):
        engine = rule.choose(q, k, v, attn_mask, need, backend)
        if engine == "flex":
            return flex.attend(
                q, k, v, mass, scale=scale, score_mod=mask.score_mod, block_mask=block_mask, ordered=mask.ordered,
                kernel_options=flex_options or {}, max_scores=max_scores,
            )  # fmt: skip
        if engine == "dense":
            out, lse = _dense(q, k, v, mass, mask, attn_mask, block_mask, scale, dropout_p)
        else:
            out, lse = _kernel(engine, q, k, v, mass, attn_mask, scale, dropout_p, want_lse)
    return out, lse, None


def _kernel(
    engine: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mass: Mass,
    attn_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    num_queries, num_keys = q.shape[2], k.shape[2]
    if engine == "cpu" and num_queries != num_keys and not torch.compiler.is_compiling():
        rows = max(1, min(ROWS, BIAS_ELEMENTS // num_keys))
        if num_queries > rows:
            return _in_row_blocks(q, k, v, mass, attn_mask, scale, want_lse, rows)
    q, scale = _positive_scale(engine, q, scale)
    bias = None
    # A single query sees every key. The CPU op takes a mask beside its own flag, which skips the upper triangle.
    causal = num_queries > 1
    if engine == "cpu" and attn_mask is not None and num_queries == num_keys:
        bias = visibility.mask_bias(attn_mask, num_queries, num_keys, q.dtype)
    elif attn_mask is not None or rule.needs_bias(engine, q, k):
        bias = visibility.causal_bias(attn_mask, num_queries, num_keys, q.dtype, q.device)
        causal = False
    settings = Settings(causal, scale, dropout_p, may_be_dead=causal and num_queries > num_keys)
    return identity.attend(engine, q, k, v, bias, mass, settings, want_lse=want_lse)


def _in_row_blocks(
    q: Tensor, k: Tensor, v: Tensor, mass: Mass, attn_mask: Tensor | None, scale: float, want_lse: bool, size: int
) -> tuple[Tensor, Tensor | None]:
    """The CPU op on a block of queries after another, S != T: causality is a bias then, which would be S x T."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    table = mass.shared_table(wide(q))

    def block(q_block: Tensor, start: int, *_: Tensor | None) -> tuple[Tensor, Tensor | None]:
        end = start + q_block.shape[2]
        keys = min(max(1, end + num_keys - num_queries), num_keys)
        bias = visibility.banded_bias(start + num_keys - num_queries, end - start, keys, -1, q.dtype)
        if attn_mask is not None:
            part = attn_mask[..., :keys] if attn_mask.shape[-1] > 1 else attn_mask
            part = part[..., start:end, :] if part.shape[-2] > 1 else part
            bias = torch.where(part, bias, -math.inf) if part.dtype == torch.bool else bias + part
        rows = table[..., start:end]
        q_block, block_scale = _positive_scale("cpu", q_block, scale)
        settings = Settings(False, block_scale)
        return identity.attend("cpu", q_block, k[:, :, :keys], v[:, :, :keys], bias, rows, settings, want_lse=want_lse)

    outs, lses = [], []
    for i, q_block in enumerate(q.split(size, dim=2)):
        if torch.is_grad_enabled():
            # Computed again in the backward: the biases of all blocks together are S x T.
            # As its arguments, what it reads is saved, and one written to before the backward raises.
            reads = (k, v, attn_mask)
            out, lse = checkpoint(block, q_block, i * size, *reads, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore
        else:
            out, lse = block(q_block, i * size)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2) if want_lse else None


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mass: Mass,
    mask: StableMask,
    attn_mask: Tensor | None,
    block_mask: BlockMask | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    num_queries, num_keys = q.shape[2], k.shape[2]
    bias = None if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask
    seen = block_mask if block_mask is not None else attn_mask if bias is None else None
    rows = visibility.visible_rows(seen, q.shape[0], q.shape[1], num_queries, num_keys, q.device, mask.ordered)
    return dense.attend(
        q,
        k,
        v,
        mass.shared_table(wide(q)),
        rows,
        scale=scale,
        bias=bias,
        score_mod=mask.score_mod,
        dropout_p=dropout_p,
        aligned=mask.ordered,
        reads=seen if isinstance(seen, Tensor) else None,
    )


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    mask: StableMask,
    *,
    scale: float | None,
    window: int,
    paged: dict[str, Any],
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """out' (1, H, T_q, D), and lse' (1, H, T_q) if wanted, of packed documents."""
    _checks.check_scale(scale)
    scale = score_scale(scale, q.shape[-1])
    mass = mask.mass(q.device, q.shape[0], k.shape[0], cu_q if mask.positions is None else None)
    # Compiled, nobody has looked whether the documents end before the rows do.
    may_be_dead = cu_q is not cu_k or torch.compiler.is_compiling()
    settings = Settings(True, scale, 0.0, may_be_dead, window, max_q, max_k)
    with no_autocast(q.device):
        if paged:
            call = Call(q, k, v, None, cu_q, cu_k, settings)
            out, lse, _ = varlen.forward(call, **paged)
            return epilogue(out, lse, mass, in_place=True)
        assert cu_k is not None, "only a paged cache has no cu_seq_k"
        engine = rule.choose_packed(q, k, want_lse and torch.is_grad_enabled())
        if engine == "dense":
            rows = visibility.document_rows(cu_q, cu_k, q.shape[0], k.shape[0], window)
            q, k, v = [varlen.to_bhsd(x) for x in (q, k, v)]
            return dense.attend(q, k, v, mass.shared_table(wide(q)), rows, scale=scale, aligned=False)
        q, scale = _positive_scale(engine, q, scale)
        settings = settings._replace(scale=scale)
        return identity.attend(engine, q, k, v, None, mass, settings, cu_q=cu_q, cu_k=cu_k, want_lse=want_lse)


def score_scale(scale: float | None, dim: int) -> float:
    """The scale of the scores; a head dim of 0 has none."""
    if scale is not None:
        return float(scale)
    return 1 / math.sqrt(dim) if dim else 1.0


def _positive_scale(engine: str, q: Tensor, scale: float) -> tuple[Tensor, float]:
    """PyTorch's flash op for CPUs gives NaN for a scale that is not positive: query takes it instead."""
    return (q * scale, 1.0) if engine in ("cpu", "varlen_cpu") and scale <= 0 else (q, scale)


def wide(x: Tensor) -> torch.dtype:
    """What scores, log M and lse are held in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _autocasts(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda", "mps", "xpu") and torch.is_autocast_enabled(device.type)


def autocast(query: Any, *others: Any) -> list[Any]:
    """What autocast does to the inputs of scaled_dot_product_attention: floating tensors but float64 take its dtype."""
    if not isinstance(query, Tensor) or not _autocasts(query.device):
        return [query, *others]  # the others are on the device of query, or will be refused
    dtype = torch.get_autocast_dtype(query.device.type)

    def casts(x: Any) -> bool:
        return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64

    return [x.to(dtype) if casts(x) else x for x in (query, *others)]


def no_autocast(device: torch.device) -> AbstractContextManager:
    """The engines choose their own precision: nothing inside them may be cast."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device) else nullcontext()
