"""Every entry point of sm_flex as one attention, in the form that sm_flex.testing calls.

python -m sm_flex.testing benchmarks.fuzz.entry_points:flex_dense
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask
from torch.nn.attention.varlen import AuxRequest as VarlenAux

from sm_flex import StableMask, flex_attention, log_mass, remask, scaled_dot_product_attention, stablemask, varlen_attn
from sm_flex.testing.contract import Attention

BLOCK = 16


def flex_on(backend: str) -> Attention:
    """flex_attention with that BACKEND; the mask as a block_mask."""

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        visible: Tensor | None,
        scale: float | None,
        sink: Tensor | None = None,
        sink_value: Tensor | None = None,
        **problem: Any,
    ) -> tuple[Tensor, Tensor]:
        mask = _mask(**problem, sink=sink, sink_value=sink_value)
        out, aux = flex_attention(
            q, k, v, score_mod=mask, block_mask=_block_mask(visible), scale=scale, enable_gqa=True,
            kernel_options={"BACKEND": backend}, return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        assert aux.lse is not None
        return out, aux.lse

    return attend


def flex_score_mod(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor | None,
    scale: float | None,
    sink: Tensor | None = None,
    sink_value: Tensor | None = None,
    **problem: Any,
) -> tuple[Tensor, Tensor]:
    """An inner score_mod that scales the scores and hides what is not visible."""
    factor = 1.0 if scale is None else scale * q.shape[-1] ** 0.5

    def inner(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        score = score * factor
        if visible is None:
            return score
        return torch.where(visible[b, torch.zeros_like(h), q_idx, kv_idx], score, -torch.inf)

    out, aux = flex_attention(
        q,
        k,
        v,
        score_mod=_mask(**problem, sink=sink, sink_value=sink_value, score_mod=inner),
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return out, aux.lse


def sdpa_on(*backends: SDPBackend, as_bias: bool = False) -> Attention:
    """scaled_dot_product_attention on a kernel, or on torch's choice; as_bias: the mask as 0 and -inf."""

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        visible: Tensor | None,
        scale: float | None,
        sink: Tensor | None = None,
        sink_value: Tensor | None = None,
        **problem: Any,
    ) -> Tensor:
        attn_mask = _beyond_causal(visible)
        if attn_mask is None and q.shape[2] != k.shape[2]:
            attn_mask = torch.ones(k.shape[2], dtype=torch.bool, device=q.device)
        elif attn_mask is not None and as_bias:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
        with sdpa_kernel(list(backends)) if backends else nullcontext():
            return scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask,
                is_causal=attn_mask is None,
                scale=scale,
                enable_gqa=True,
                score_mod=_mask(**problem, sink=sink, sink_value=sink_value),
            )

    return attend


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gamma: Tensor,
    length: int,
    positions: Tensor | None,
    visible: Tensor | None,
    scale: Any,
    sink: Tensor | None = None,
    sink_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The batch packed into one row, a document for each of its rows, or for each that the mask has."""
    batch, heads, num_queries, _ = q.shape
    num_keys = k.shape[2]
    starts, window = [0], -1
    if visible is not None:
        if num_queries != num_keys:
            raise NotImplementedError("a mask with S != T is not taken apart into documents")
        starts, window = _documents(visible)
    cu = torch.tensor([row * num_keys + start for row in range(batch) for start in starts] + [batch * num_keys])
    cu_k = cu.to(device=q.device, dtype=torch.int32)
    cu_q = cu_k if num_queries == num_keys else (cu_k // num_keys * num_queries)
    if positions is None and len(starts) > 1:
        positions = torch.arange(num_queries, device=q.device)
    if positions is not None:
        positions = positions.expand(batch, -1).flatten()
        restart = torch.cat([torch.arange(n) for n in cu.diff().tolist()]).to(q.device)
        if num_queries == num_keys and torch.equal(positions, restart):
            positions = None  # varlen_attn restarts them by itself
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    mask = stablemask(gamma, length=length, positions=positions, sink=sink, sink_value=sink_value)
    out, lse = varlen_attn(
        q, k, v, cu_q, cu_k, num_queries, num_keys, window_size=(window, 0), scale=scale, enable_gqa=True,
        return_aux=VarlenAux(lse=True), score_mod=mask,
    )  # fmt: skip
    return out.unflatten(0, (batch, num_queries)).transpose(1, 2), lse.reshape(heads, batch, num_queries).transpose(0, 1)


def remask_over_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gamma: Tensor,
    length: int,
    positions: Tensor | None,
    visible: Tensor | None,
    scale: Any,
    sink: Tensor | None = None,
    sink_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """remask() and log_mass() after a causal attention of one's own, in plain PyTorch."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    wide_q, wide_k, wide_v = (x.to(wide) for x in (q, k, v))
    wide_k, wide_v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (wide_k, wide_v))
    seen = visible
    if seen is None:
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - num_queries)
    scores = (wide_q @ wide_k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~seen, -torch.inf)
    masked = torch.isneginf(scores).all(-1)  # fully masked rows
    scores = scores.masked_fill(masked.unsqueeze(-1), 0.0)
    out = (torch.softmax(scores, -1) @ wide_v).masked_fill(masked.unsqueeze(-1), 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(masked, -torch.inf)
    rows = torch.arange(num_queries, device=q.device) if positions is None else positions
    if sink_value is not None:
        sink_value = sink_value.repeat_interleave(q.shape[1] // sink_value.shape[0], dim=0)
    out, lse = remask(out, lse, log_mass(gamma, rows, length), sink=sink, sink_value=sink_value)
    return out.to(q.dtype), lse


flex_cpu, flex_dense = flex_on("FLASH_ATTENTION"), flex_on("MATH")
sdpa_cpu, sdpa_dense = sdpa_on(SDPBackend.FLASH_ATTENTION), sdpa_on(SDPBackend.MATH)
sdpa_float_mask = sdpa_on(as_bias=True)  # on a CPU by its kernel

CPU_PATHS: dict[str, Attention] = {
    "flex_attention, cpu": flex_cpu,
    "flex_attention, dense, block_mask": flex_dense,
    "flex_attention, dense, score_mod": flex_score_mod,
    "scaled_dot_product_attention, cpu, boolean mask": sdpa_cpu,
    "scaled_dot_product_attention, cpu, float mask": sdpa_float_mask,
    "scaled_dot_product_attention, dense, boolean mask": sdpa_dense,
    "varlen_attn, varlen_cpu": varlen,
    "remask": remask_over_softmax,
}


CUDA_PATHS: dict[str, Attention] = {
    "flex_attention, flash": flex_on("FLASH_ATTENTION"),
    "flex_attention, cudnn": flex_on("CUDNN_ATTENTION"),
    "flex_attention, efficient": flex_on("EFFICIENT_ATTENTION"),
    "flex_attention, flex, block_mask": flex_on("AUTO"),
    "flex_attention, dense, block_mask": flex_dense,
    "scaled_dot_product_attention, torch's choice": sdpa_float_mask,
    "varlen_attn, varlen": varlen,
    "remask": remask_over_softmax,
}


def _mask(
    gamma: Tensor,
    length: int,
    positions: Tensor | None,
    sink: Tensor | None,
    sink_value: Tensor | None,
    score_mod: Callable[..., Tensor] | None = None,
) -> StableMask:
    # One gamma for all heads that is not learned is passed as a number.
    uniform = not gamma.requires_grad and bool((gamma == gamma[0]).all())
    number_or_tensor = gamma[0].item() if uniform else gamma
    options: dict[str, Any] = {"positions": positions, "score_mod": score_mod, "sink": sink, "sink_value": sink_value}
    return stablemask(number_or_tensor, length=length, **options)


def _beyond_causal(visible: Tensor | None) -> Tensor | None:
    """The mask with the future shown: what narrows it to the causal slots must be the library."""
    if visible is None:
        return None
    num_queries, num_keys = visible.shape[-2:]
    return visible | torch.ones(num_queries, num_keys, dtype=torch.bool, device=visible.device).triu(1 + num_keys - num_queries)


def _block_mask(visible: Tensor | None) -> BlockMask | None:
    seen = _beyond_causal(visible)
    if seen is None:
        return None
    batch, _, num_queries, num_keys = seen.shape
    return create_block_mask(
        lambda b, h, i, j: seen[b, 0, i, j], batch, None, num_queries, num_keys, device=str(seen.device), BLOCK_SIZE=BLOCK
    )  # fmt: skip


def _documents(visible: Tensor) -> tuple[list[int], int]:
    """The first slot of each packed document, and the window, of a mask (B, 1, S, S) of those alone."""
    rows = torch.arange(visible.shape[-1], device=visible.device)
    first = visible[0, 0].int().argmax(-1)  # the first key that each row sees
    starts = torch.where(first == rows, rows, 0).cummax(0).values
    window = int((rows - first).max())
    seen = (starts.unsqueeze(1) == starts) & (rows <= rows.unsqueeze(1)) & (rows.unsqueeze(1) - rows <= window)
    if not bool((visible == seen).all()):
        raise NotImplementedError("varlen_attn has documents and a window, and no other mask")
    return sorted(set(starts.tolist())), window
