"""Equation 11 of the StableMask paper, typed from the paper, in float64, and nothing of this library.

Rows and columns count from 0 and positions from 0, so that the paper's -(j-1) gamma with j from 1 is -j gamma here.
Every pseudo score gets a column of its own, and so does a sink: slow, quadratic, obvious.
"""

import math

import torch
from torch import Tensor


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gamma: float | Tensor,
    length: int | None = None,
    positions: Tensor | None = None,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    sink: float | Tensor | None = None,
    sink_value: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """StableMask attention by eq. 11: out = (softmax(A * C + P) * C) V, with one column for each pseudo score.

    Differentiable in every floating input. Section 4.3 gives the rows at and beyond the training length their one score
    tau = -(p+1) gamma. A sink is one more pseudo column in every row, of score sink; with sink_value it is the only one
    that has a value, so that out gains exp(sink - lse) * sink_value.

    Args:
        query: (B, H, S, D). key, value: (B, Hkv, T, D) and (B, Hkv, T, Dv), with H a multiple of Hkv.
        gamma: a number, or (), or (H,).
        length: N, the training length; T where it is None.
        positions: (S,) or (B, S); 0..S-1 where None.
        visible: bool, broadcastable to (B, H, S, T), on top of causality by slot (key j is seen by query i when
            j <= i + T - S).
        bias: added to the real scores, broadcastable to (B, H, S, T).
        scale: 1/sqrt(D) where None.
        sink: a number, or a tensor: 0-d, (H,), or broadcastable to (B, H, S). -inf gives nothing.
        sink_value: (H, Dv), or (Hkv, Dv) with one for the query heads of each key head. A row that sees no key and has no
            mass of gamma is this value.
        dtype: of every step. float64 is the oracle; the dtype of the inputs is the plain formula, whose error is the
            yardstick for a kernel in that dtype.

    Returns:
        out (B, H, S, Dv) and the log-sum-exp of the whole row of A_SM (B, H, S), both in dtype. A row without any finite
        score has out 0 and lse -inf.

    Raises:
        ValueError: sink_value without sink, or of another shape.
    """
    batch, heads, num_q, dim = query.shape
    num_k = key.shape[2]
    q, k, v = (x.to(dtype) for x in (query, key, value))
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    v = v.repeat_interleave(heads // v.shape[1], dim=1)
    length = num_k if length is None else length
    if positions is None:
        positions = torch.arange(num_q, device=q.device)
    p = positions.expand(batch, num_q).reshape(batch, 1, num_q, 1)
    g = _tensor(gamma).to(device=q.device, dtype=dtype).reshape(1, -1, 1, 1)

    # Real scores: C keeps what a query sees.
    scores = q @ k.transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.to(dtype)
    i = torch.arange(num_q, device=q.device).reshape(num_q, 1)
    j = torch.arange(num_k, device=q.device)
    seen = (j <= i + num_k - num_q).expand(batch, heads, num_q, num_k)
    if visible is not None:
        seen = seen & visible
    real = scores.masked_fill(~seen, -math.inf)

    # Pseudo scores: P is -j gamma right of the row's position, for j < N; tau = -(p+1) gamma from N on.
    column = torch.arange(length, device=q.device)
    pseudo = torch.where(column > p, -column * g, -math.inf)
    pseudo = torch.where((column == 0) & (p >= length), -(p + 1) * g, pseudo)
    pseudo = torch.where(torch.isinf(g), -math.inf, pseudo).expand(batch, heads, num_q, length)

    columns = [real, pseudo]
    if sink is not None:
        z = _tensor(sink).to(device=q.device, dtype=dtype)
        z = z.unsqueeze(-1) if z.dim() == 1 else z
        columns.append(z.expand(batch, heads, num_q).unsqueeze(-1))

    row = torch.cat(columns, dim=-1)
    nothing = torch.isneginf(row).all(-1, keepdim=True)
    probability = torch.softmax(row.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)
    lse = torch.logsumexp(row.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing.squeeze(-1), -math.inf)
    out = (probability[..., :num_k] * seen) @ v
    if sink_value is not None:
        out = out + probability[..., -1:] * _value_of_each_head(sink_value, sink, query, value).to(dtype)
    return out, lse


def _tensor(x: float | Tensor) -> Tensor:
    """A number is kept in float64."""
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)


def _value_of_each_head(sink_value: Tensor, sink: float | Tensor | None, query: Tensor, value: Tensor) -> Tensor:
    """(H, 1, Dv)."""
    if sink is None:
        raise ValueError("sink_value needs a sink, got None")
    heads, (kv_heads, dim) = query.shape[1], (value.shape[1], value.shape[-1])
    if sink_value.shape not in ((heads, dim), (kv_heads, dim)):
        expected = f"(H, Dv) = {(heads, dim)} or (Hkv, Dv) = {(kv_heads, dim)}"
        raise ValueError(f"sink_value must be {expected}, got {tuple(sink_value.shape)}")
    return sink_value.repeat_interleave(heads // sink_value.shape[0], dim=0).unsqueeze(1)
