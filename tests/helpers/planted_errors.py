"""StableMask in plain PyTorch, in the form that sm_flex.testing calls, right or with one error planted."""

import math
from typing import Any

import torch
from torch import Tensor

from sm_flex import log_mass


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gamma: Tensor,
    length: int,
    positions: Tensor | None,
    visible: Tensor | None,
    scale: float | None,
    sink: Tensor | None = None,
    sink_value: Tensor | None = None,
    error: str = "",
) -> tuple[Tensor, Tensor]:
    """StableMask in plain PyTorch, in float32 at least, with one error planted."""
    num_queries, num_keys, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    rows = torch.arange(num_queries) if positions is None else positions
    if error == "mass off by one row":
        rows = rows + 1
    if error == "gamma of the wrong head under GQA":
        gamma = gamma.unflatten(0, (groups, -1)).T.flatten()
    if error == "mass that follows the cache length":
        length = num_keys
    if error == "packed positions not restarting" and visible is not None:
        rows = torch.arange(num_keys - num_queries, num_keys)
    leak = error == "future leak of one key" and visible is None
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries + leak)
    seen = seen if visible is None else visible
    wide = torch.promote_types(q.dtype, torch.float32)
    wide_k, wide_v = (x.to(wide).repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q.to(wide) @ wide_k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    real = scores.masked_fill(~seen, -1e30)
    lse = torch.logsumexp(real, -1)
    if error == "lse cast to bf16 before the share":
        lse = lse.bfloat16().to(wide)
    new_lse = torch.logaddexp(lse, log_mass(gamma, rows, length))
    without_sink = new_lse
    if sink is not None and error != "forgotten sink":
        each_head = sink.flip(0) if error == "sink of the wrong head" else sink
        if error == "sink in bf16":
            each_head = sink.bfloat16().to(wide)
        new_lse = torch.logaddexp(
            new_lse, (each_head.detach() if error == "sink without a gradient" else each_head).unsqueeze(-1)
        )
    nothing = new_lse < -1e29  # neither a key nor any mass
    out = (torch.exp(real - new_lse.unsqueeze(-1)).masked_fill(nothing.unsqueeze(-1), 0.0) @ wide_v).to(q.dtype)
    new_lse = new_lse.masked_fill(nothing, -math.inf)
    if error == "sink added after the remask":
        share = torch.exp(real - without_sink.unsqueeze(-1)).masked_fill(without_sink.unsqueeze(-1) < -1e29, 0.0)
        out = (share @ wide_v).to(q.dtype)
    if sink is not None and sink_value is not None and error != "value of the sink forgotten":
        out = out + _value_part(error, sink, sink_value, new_lse, lse, groups).to(q.dtype)
    if error == "lse without the sink":
        new_lse = without_sink.masked_fill(without_sink < -1e29, -math.inf)
    if error == "dropped lse gradient":
        new_lse = new_lse.detach()
    if error == "lse cast to bf16":
        new_lse = new_lse.bfloat16().to(wide)
    if error == "lse returned in bf16":
        new_lse = new_lse.bfloat16()
    if error == "out scaled but lse not":
        new_lse = lse.masked_fill(nothing, -math.inf)
    if error == "zeros":
        out = out * 0
    if error == "plain causal attention":
        out, new_lse = out * torch.exp(new_lse - lse).unsqueeze(-1).to(out.dtype), lse
    return out, new_lse


def _value_part(error: str, sink: Tensor, value: Tensor, new_lse: Tensor, lse: Tensor, groups: int) -> Tensor:
    """p_sink * v, with the errors that there may be in it."""
    heads = new_lse.shape[1]
    value = value.to(new_lse.dtype).repeat_interleave(heads // value.shape[0], dim=0)
    if error == "value of the wrong head":
        value = value.flip(0)
    if error == "value without a gradient":
        value = value.detach()
    share = torch.exp(sink.unsqueeze(-1) - new_lse)
    if error == "share of the sink without a gradient":
        share = share.detach()
    if error == "share of the sink from what is not real":  # the mass of gamma takes some of it
        share = 1 - torch.exp(lse - new_lse)
    if error == "share of the sink from the lse of the real scores":
        share = torch.exp(sink.unsqueeze(-1) - lse.clamp(min=-1e4))
    share = share.nan_to_num(0.0).masked_fill(torch.isneginf(sink).unsqueeze(-1), 0.0)
    return share.unsqueeze(-1) * value.unsqueeze(1)


def with_error(error: str) -> Any:
    def fn(
        q: Tensor, k: Tensor, v: Tensor, *, sink: Tensor | None = None, sink_value: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, sink=sink, sink_value=sink_value, **options, error=error)

    return fn
