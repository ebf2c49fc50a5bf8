"""From a checked request to the engine that serves it, for a batch and for packed documents.

Without a mass, torch's own scaled_dot_product_attention serves what it can. All else is StableMask's: with gamma
= inf there is no mass, and causality is aligned to the end, fully masked rows are 0, and lse is at hand.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from sm_flex.checks.fits import check_mask_fits
from sm_flex.dispatch import attend, attend_packed
from sm_flex.engines import Need, choose, cpu, dense, flex
from sm_flex.engines.varlen import to_bhsd, to_thd
from sm_flex.flash_attn.request import Request
from sm_flex.flash_attn.spans import Spans, at, document_spans, spans_of
from sm_flex.mass.closed_form import row_positions
from sm_flex.runtime import no_autocast, readable, score_dtype, score_scale
from sm_flex.score_mod import ScoreMod, StableMask

Result = tuple[Tensor, Tensor | None]


def attend_batch(q: Tensor, k: Tensor, v: Tensor, request: Request, *, return_lse: bool = False) -> Result:
    """out (B, S, H, Dv), and the log-sum-exp (B, H, S) if wanted. A query stands at the end of its keys."""
    batch, num_queries, heads = q.shape[:3]
    num_keys = k.shape[1]
    left = -1 if request.left >= num_keys - 1 else request.left
    right = -1 if request.right >= num_queries - 1 and request.right > 0 else request.right
    q_BHSD, k_BHTD, v_BHTD = [x.transpose(1, 2) for x in (q, k, v)]
    full = left == -1 and (right == -1 or num_queries == 1)
    on_torch = full or (left == -1 and right == 0 and num_queries == num_keys)
    # On a CPU torch's own holds S x T scores where the value's head dim differs; ours does not.
    on_torch = on_torch and (q.device.type != "cpu" or q.shape[-1] == v.shape[-1] or num_queries < cpu.FEW_QUERIES)
    if on_torch and request.plain and not return_lse and (request.dropout_p == 0 or q.is_cuda):
        return _attend_on_torch(q_BHSD, k_BHTD, v_BHTD, request, causal=not full).transpose(1, 2), None
    options: Any
    shift = num_keys - num_queries
    slot = torch.arange(num_queries, device=q.device) + shift
    mask = mask_of(request, q, num_keys, None if shift == 0 else slot.clamp(min=0))
    check_mask_fits(mask, (batch, heads, num_queries), num_queries, q.device, values=v.shape[-2:])
    inner = score_mod_of(request, slot, q, k)
    if left == -1 and right == 0:
        mask = _with(mask, score_mod=inner)
        options = {"scale": request.scale, "dropout_p": request.dropout_p, "return_lse": return_lse}
        out, lse, _ = attend(q_BHSD, k_BHTD, v_BHTD, mask, **options)
    elif inner is None and request.dropout_p == 0 and _packs(q, k, v, return_lse):
        return _attend_rows_as_documents(q, k, v, mask, request._replace(left=left, right=right), return_lse)
    else:
        spans, options = spans_of(slot, 0, num_keys, left, right), {"aligned": right == 0, "return_lse": return_lse}
        out, lse = attend_spans(q_BHSD, k_BHTD, v_BHTD, mask, inner, spans, request, **options)
    return out.transpose(1, 2), lse


def _attend_on_torch(q_BHSD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, request: Request, *, causal: bool) -> Tensor:
    scale = request.scale
    if scale is not None and scale <= 0:  # torch's causal kernel for CPUs gives NaN: q takes the scale instead
        q_BHSD, scale = q_BHSD * scale, 1.0
    # A bool also where dynamic shapes make of the comparison a symbol, which torch does not take.
    grouped = True if q_BHSD.shape[1] != k_BHTD.shape[1] else False  # noqa: SIM210
    options: Any = {"scale": scale, "enable_gqa": grouped}
    with no_autocast(q_BHSD.device):
        return F.scaled_dot_product_attention(q_BHSD, k_BHTD, v_BHTD, None, request.dropout_p, causal, **options)


def _attend_rows_as_documents(q: Tensor, k: Tensor, v: Tensor, mask: StableMask, request: Request, return_lse: bool) -> Result:
    """The rows of the batch laid one after another: only kernels for packed documents have windows."""
    (batch, num_queries, heads), num_keys = q.shape[:3], k.shape[1]
    rows = torch.arange(batch + 1, device=q.device, dtype=torch.int32)
    cu_q = rows * num_queries
    documents = (cu_q, cu_q if num_queries == num_keys else rows * num_keys, num_queries, num_keys)
    positions, sink = mask.positions, mask.sink
    if positions is not None:
        positions = positions.expand(batch, num_queries).flatten()
    if sink is not None and sink.dim() > 1:
        sink = sink.expand(batch, heads, num_queries).transpose(0, 1).flatten(1)
    mask = _with(mask, positions=positions, sink=sink)
    options: Any = {"scale": request.scale, "window": request.left, "right": request.right, "return_lse": return_lse}
    q, k, v = [x.flatten(0, 1) for x in (q, k, v)]
    out, lse = attend_packed(q, k, v, *documents, mask, paged={}, **options)
    if lse is not None:
        lse = lse.squeeze(0).unflatten(1, (batch, num_queries)).transpose(0, 1)
    return to_thd(out).unflatten(0, (batch, num_queries)), lse


def attend_documents(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, request: Request
) -> Tensor:
    """out (T_q, H, Dv) of packed documents. A document's queries stand at the end of its keys."""
    num_queries, heads = q.shape[:2]
    if readable(cu_q) and cu_k is not cu_q and torch.equal(cu_q, cu_k):
        cu_k = cu_q
    positions = None
    if request.mask is not None:
        if request.mask.score_mod is not None:
            raise NotImplementedError("score_mod inside a StableMask is not taken with packed documents: use flash_attn_func")
        if request.mask.length is None:
            raise ValueError("length is required with packed documents: pass stablemask(gamma, length=N), the training length")
        if cu_q is not cu_k and request.mask.positions is None:
            spans, document = document_spans(cu_q, cu_k, num_queries, -1, 0)
            positions = (spans.slot - cu_k[document]).clamp(min=0)
    mask = mask_of(request, q, k.shape[0], positions)
    if mask.positions is not None and mask.positions.dim() != 1:
        raise ValueError(f"positions must be (T_q,) = ({num_queries},), got {tuple(mask.positions.shape)}")
    check_mask_fits(mask, (1, heads, num_queries), num_queries, q.device, values=v.shape[-2:])
    if not request.changes_scores and request.dropout_p == 0:
        options: Any = {"scale": request.scale, "window": request.left, "right": request.right, "return_lse": False}
        out, _ = attend_packed(q, k, v, cu_q, cu_k, max_q, max_k, mask, paged={}, **options)
        return to_thd(out)
    spans, document = document_spans(cu_q, cu_k, num_queries, request.left, request.right)
    if mask.positions is None and request.mask is not None:
        mask = _with(mask, positions=row_positions(num_queries, cu_q, q.device))
    inner = score_mod_of(request, spans.slot, q, k, document)
    q, k, v = [to_bhsd(x) for x in (q, k, v)]
    out, _ = attend_spans(q, k, v, mask, inner, spans, request)
    return to_thd(out)


def attend_spans(
    q_BHSD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    mask: StableMask,
    inner: ScoreMod | None,
    spans: Spans,
    request: Request,
    *,
    aligned: bool = False,
    return_lse: bool = False,
) -> Result:
    """What no kernel of the library takes: torch's flex_attention on CUDA, plain PyTorch in blocks of rows elsewhere.

    aligned: no row i sees a key beyond i + T - S.
    """
    batch, _, num_queries, _ = q_BHSD.shape
    num_keys = k_BHTD.shape[2]
    need = Need(q_BHSD, k_BHTD, v_BHTD, score_mod=True, block_mask=True, dropout_p=request.dropout_p, lse_grad=return_lse)
    options: Any = {"scale": score_scale(request.scale, q_BHSD.shape[-1])}
    with no_autocast(q_BHSD.device):
        mass = mask.mass(q_BHSD.device, num_queries, num_keys, score_dtype(q_BHSD), heads=q_BHSD.shape[1])
        if choose.choose(need) == "flex":
            rows = batch if spans.slot.dim() == 2 else None
            block_mask = create_block_mask(spans.mask_mod(), rows, None, num_queries, num_keys, device=str(q_BHSD.device))
            alone = _with(mask, score_mod=inner, ordered=False)
            options |= {"block_mask": block_mask, "kernel_options": {}, "max_scores": False}
            out, lse, _ = flex.attend(q_BHSD, k_BHTD, v_BHTD, alone, mass, **options)
            return out, lse
        options |= {"aligned": aligned, "score_mod": inner, "dropout_p": request.dropout_p}
        mass = mass.tabled(num_queries, score_dtype(q_BHSD))
        return dense.attend(q_BHSD, k_BHTD, v_BHTD, mass, spans.rows(num_keys), **options)


def _packs(q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> bool:
    """Whether a kernel for packed documents takes the rows of a batch, which alone have windows."""
    lse_grad = return_lse and torch.is_grad_enabled()
    return choose.choose(Need(q, k, v, lse_grad=lse_grad, packed=True)) != "dense"


def mask_of(request: Request, q: Tensor, num_keys: int, positions: Tensor | None) -> StableMask:
    """The request's StableMask with a length, and with these positions where it has none.

    Without one a mask that has no mass but that of a sink.
    """
    mask = request.mask
    if mask is None:
        gamma = torch.full((), math.inf, device=q.device, dtype=score_dtype(q))
        return StableMask(gamma, 1, None, None, request.sink)
    if mask.positions is not None or positions is None:
        return _with(mask, length=num_keys if mask.length is None else mask.length)
    if mask.length is None:
        raise ValueError(
            "length is required where query and key lengths differ: pass stablemask(gamma, length=N), the training length"
        )
    return _with(mask, positions=positions)


def _with(mask: StableMask, **changes: Any) -> StableMask:
    """The mask with other fields, and with the copies of its numbers that it holds for each device."""
    names = ("gamma", "length", "positions", "score_mod", "sink", "sink_value", "ordered", "_copies")
    return StableMask(**{name: changes.get(name, getattr(mask, name)) for name in names})


def score_mod_of(request: Request, slot: Tensor, q: Tensor, k: Tensor, document: Tensor | None = None) -> ScoreMod | None:
    """cap * tanh(score / cap) - slope * |slot - key|, in flash-attn's order; a StableMask's own score_mod alone.

    slot: (S,) or (B, S), the key that a query stands at. document: (S,), whose slopes a query takes.
    """
    if not request.changes_scores or 0 in (*q.shape, *k.shape):
        return None
    if request.mask is not None and request.mask.score_mod is not None:
        return request.mask.score_mod
    # A number captured by a score_mod compiles anew for each value, and torch's flex fails on it; a tensor does not.
    cap = None
    if request.softcap > 0:
        cap = torch.full((), request.softcap, device=q.device, dtype=score_dtype(q))
    # A copy, since the backward computes the scores again, and the caller may have written to theirs by then.
    slopes = None if request.slopes is None else request.slopes.to(score_dtype(q), copy=True)
    of_document = document is not None and slopes is not None and slopes.dim() == 2
    if slopes is not None and of_document:
        slopes = slopes[document]

    def inner(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        if slopes is not None:
            slope = slopes[h] if slopes.dim() == 1 else slopes[q_idx if of_document else b, h]
            score = score - slope * (at(slot, b, q_idx) - kv_idx).abs()
        return score

    return inner
