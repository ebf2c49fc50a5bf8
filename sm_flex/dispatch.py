"""From a checked call to (out', lse'): choose the engine, hand it what it needs, run it.

autograd.py runs the library kernels. torch's flex and the dense engine differentiate by themselves.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sm_flex import plans
from sm_flex.engines import (
    Call,
    MaskedKernel,
    Need,
    autograd,
    choose,
    cpu,
    cpu_chunks,
    cudnn,
    dense,
    efficient,
    flash,
    flex,
    varlen,
)
from sm_flex.epilogue.remask import epilogue
from sm_flex.runtime import no_autocast, score_dtype, score_scale
from sm_flex.score_mod import StableMask
from sm_flex.visibility.rows import document_rows, visible_rows

CPU = torch.device("cpu")
MASKED_KERNELS: dict[str, MaskedKernel] = {"flash": flash, "cudnn": cudnn, "efficient": efficient, "cpu": cpu}


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
    kernel_options: dict[str, Any] | None = None,
    max_scores: bool = False,
    return_lse: bool = False,
    kind: plans.Kind | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out' (B, H, S, Dv), and lse' and the row maxima, (B, H, S), where wanted. attn_mask has four dimensions.

    kind: of the call, for which a plan is kept if it can have one.
    """
    scale = score_scale(scale, q.shape[-1])
    flex_options = dict(kernel_options or {})
    backend = flex_options.pop("BACKEND", "AUTO")
    need = Need(
        q,
        k,
        v,
        attn_mask,
        backend,
        score_mod=mask.score_mod is not None,
        block_mask=block_mask is not None,
        flex_options=bool(flex_options) or max_scores,
        dropout_p=dropout_p,
        lse_grad=return_lse and torch.is_grad_enabled(),
    )
    options: Any
    with no_autocast(q.device):
        engine = choose.choose(need)
        if kind is not None and engine == "cpu" and _can_have_a_plan(q, k, v, scale, dropout_p):
            # This call goes the way of the next ones: a checkpointed layer that runs again must save what it saved.
            plan = plans.Plan(q.shape[2] > 1, scale, score_dtype(q), q.shape[1], q.shape[2], k.shape[2])
            plans.keep(kind, plan)
            return *attend_planned(q, k, v, mask, plan, return_lse=return_lse), None
        in_order = {"heads": q.shape[1], "heads_last": engine == "cpu"}
        mass = mask.mass(q.device, q.shape[2], k.shape[2], score_dtype(q), **in_order)
        if engine == "flex":
            if backend in choose.FLEX_BACKENDS:
                flex_options["BACKEND"] = backend
            options = {"kernel_options": flex_options, "max_scores": max_scores}
            return flex.attend(q, k, v, mask, mass, scale=scale, block_mask=block_mask, **options)
        if engine == "dense":
            is_bias = attn_mask is not None and attn_mask.dtype != torch.bool
            seen = block_mask if block_mask is not None or is_bias else attn_mask
            visible = visible_rows(seen, q.shape[:3], k.shape[2], q.device, mask.ordered)
            options = {"bias": attn_mask if is_bias else None, "reads": seen if isinstance(seen, Tensor) else None}
            options |= {"score_mod": mask.score_mod, "dropout_p": dropout_p, "aligned": mask.ordered}
            return *dense.attend(q, k, v, mass.tabled(q.shape[2], score_dtype(q)), visible, scale=scale, **options), None
        if engine == "cpu" and cpu_chunks.takes(q.shape[2], k.shape[2]):
            chunk = cpu_chunks.call_of(q, k, v, attn_mask, scale)
            return *autograd.attend("cpu_chunks", chunk, mass, return_lse=return_lse), None
        bias, causal = MASKED_KERNELS[engine].causality(attn_mask, q, k)
        may_be_masked = causal and q.shape[2] > k.shape[2]
        call = Call(q, k, v, bias, None, None, causal, scale, dropout_p, may_be_masked)
        return *autograd.attend(engine, call, mass, return_lse=return_lse), None


def _can_have_a_plan(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> bool:
    """Whether one kernel of a CPU takes the call without a bias, and no row is fully masked."""
    return q.shape[2] in (1, k.shape[2]) and q.shape[-1] == v.shape[-1] and scale > 0 and not dropout_p


def attend_planned(
    q: Tensor, k: Tensor, v: Tensor, mask: StableMask, plan: plans.Plan, *, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """attend() of a call whose kind has a plan."""
    mass = mask.mass(CPU, plan.num_queries, plan.num_keys, plan.dtype, heads=plan.heads, heads_last=True, planned=True)
    return autograd.attend_planned(q, k, v, mass, plan.causal, plan.scale, return_lse)


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
    return_lse: bool,
    right: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """out' (1, H, T_q, D), and lse' (1, H, T_q) if wanted, of packed documents.

    window, right: how many keys before and after its own a query sees, -1 for all.
    """
    scale = score_scale(scale, q.shape[-1])
    # Under torch.compile the values of cu_seqlens were not checked: rows after the last document may exist,
    # and see nothing.
    may_be_masked = cu_q is not cu_k or torch.compiler.is_compiling()
    options: Any = {"may_be_masked": may_be_masked, "window": window, "right": right, "max_q": max_q, "max_k": max_k}
    call = Call(q, k, v, None, cu_q, cu_k, causal=True, scale=scale, **options)
    with no_autocast(q.device):
        mass = mask.mass(q.device, q.shape[0], k.shape[0], score_dtype(q), cu_q, heads=q.shape[1])
        if paged:
            out, lse, _ = varlen.forward(call, **paged)
            return epilogue(out, lse, mass, in_place=True)
        assert cu_k is not None, "only a paged cache has no cu_seq_k"
        engine = choose.choose(Need(q, k, v, lse_grad=return_lse and torch.is_grad_enabled(), packed=True))
        if engine != "dense":
            return autograd.attend(engine, call, mass, return_lse=return_lse)
        visible = document_rows(cu_q, cu_k, q.shape[0], k.shape[0], window, right)
        q, k, v = [varlen.to_bhsd(x) for x in (q, k, v)]
        return dense.attend(q, k, v, mass.tabled(q.shape[2], score_dtype(q)), visible, scale=scale, aligned=False)
