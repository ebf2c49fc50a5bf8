"""From a checked request to (out', lse'): pick the engine, hand it what it needs, run it.

engines/autograd.py runs the library kernels; torch's flex and the dense engine differentiate by themselves.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from sm_flex.checks import call as checks
from sm_flex.engines import Call, Settings, autograd, choose, dense, flex, varlen
from sm_flex.epilogue.remask import epilogue
from sm_flex.mass.table import Mass
from sm_flex.runtime import no_autocast, score_scale, wide
from sm_flex.score_mod import StableMask
from sm_flex.visibility import bias as biases
from sm_flex.visibility.rows import document_rows, visible_rows

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
    checks.check_scale(scale)
    checks.check_mask_fits(mask, q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device, block_mask)
    scale = score_scale(scale, q.shape[-1])
    need = choose.Need(
        score_mod=mask.score_mod is not None,
        block_mask=block_mask is not None,
        flex_options=bool(flex_options) or max_scores,
        dropout_p=dropout_p,
        lse_grad=want_lse and torch.is_grad_enabled(),
    )
    mass = mask.mass(q.device, q.shape[2], k.shape[2])
    with no_autocast(q.device):
        engine = choose.choose(q, k, v, attn_mask, need, backend)
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
        bias = biases.mask_bias(attn_mask, num_queries, num_keys, q.dtype)
    elif attn_mask is not None or choose.needs_bias(engine, q, k):
        bias = biases.causal_bias(attn_mask, num_queries, num_keys, q.dtype, q.device)
        causal = False
    settings = Settings(causal, scale, dropout_p, may_be_dead=causal and num_queries > num_keys)
    return autograd.attend(engine, q, k, v, bias, mass, settings, want_lse=want_lse)


def _in_row_blocks(
    q: Tensor, k: Tensor, v: Tensor, mass: Mass, attn_mask: Tensor | None, scale: float, want_lse: bool, size: int
) -> tuple[Tensor, Tensor | None]:
    """The CPU op on a block of queries after another, S != T: causality is a bias then, which would be S x T."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    table = mass.shared_table(wide(q))

    def block(q_block: Tensor, start: int, *_: Tensor | None) -> tuple[Tensor, Tensor | None]:
        end = start + q_block.shape[2]
        keys = min(max(1, end + num_keys - num_queries), num_keys)
        bias = biases.banded_bias(start + num_keys - num_queries, end - start, keys, -1, q.dtype)
        if attn_mask is not None:
            part = attn_mask[..., :keys] if attn_mask.shape[-1] > 1 else attn_mask
            part = part[..., start:end, :] if part.shape[-2] > 1 else part
            bias = torch.where(part, bias, -math.inf) if part.dtype == torch.bool else bias + part
        rows = table[..., start:end]
        q_block, block_scale = _positive_scale("cpu", q_block, scale)
        settings = Settings(False, block_scale)
        return autograd.attend("cpu", q_block, k[:, :, :keys], v[:, :, :keys], bias, rows, settings, want_lse=want_lse)

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
    rows = visible_rows(seen, q.shape[0], q.shape[1], num_queries, num_keys, q.device, mask.ordered)
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
    checks.check_scale(scale)
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
        engine = choose.choose_packed(q, k, want_lse and torch.is_grad_enabled())
        if engine == "dense":
            rows = document_rows(cu_q, cu_k, q.shape[0], k.shape[0], window)
            q, k, v = [varlen.to_bhsd(x) for x in (q, k, v)]
            return dense.attend(q, k, v, mass.shared_table(wide(q)), rows, scale=scale, aligned=False)
        q, scale = _positive_scale(engine, q, scale)
        settings = settings._replace(scale=scale)
        return autograd.attend(engine, q, k, v, None, mass, settings, cu_q=cu_q, cu_k=cu_k, want_lse=want_lse)


def _positive_scale(engine: str, q: Tensor, scale: float) -> tuple[Tensor, float]:
    """PyTorch's flash op for CPUs gives NaN for a scale that is not positive: query takes it instead."""
    return (q * scale, 1.0) if engine in ("cpu", "varlen_cpu") and scale <= 0 else (q, scale)
