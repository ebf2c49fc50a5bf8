"""Equation 11 of the StableMask paper, typed from the paper, in float64, and nothing of this library.

Rows and columns count from 0 and positions from 0, so that the paper's -(j-1) gamma with j from 1 is -j gamma here.
Every pseudo score gets a column of its own: slow, quadratic, obvious.
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
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """StableMask attention by eq. 11: out = (softmax(A * C + P) * C) V, with one column for each pseudo score.

    Differentiable in every floating input. Section 4.3 gives the rows at and beyond the training length their one score
    tau = -(p+1) gamma.

    Args:
        query: (B, H, S, D). key, value: (B, Hkv, T, D) and (B, Hkv, T, Dv), with H a multiple of Hkv.
        gamma: a number, or (), or (H,).
        length: N, the training length; T where it is None.
        positions: (S,) or (B, S); 0..S-1 where None.
        visible: bool, broadcastable to (B, H, S, T), on top of causality by slot (key j is seen by query i when
            j <= i + T - S).
        bias: added to the real scores, broadcastable to (B, H, S, T).
        scale: 1/sqrt(D) where None.
        dtype: of every step. float64 is the oracle; the dtype of the inputs is the plain formula, whose error is the
            yardstick for a kernel in that dtype.

    Returns:
        out (B, H, S, Dv) and the log-sum-exp of the whole row of A_SM (B, H, S), both in dtype.
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
    exact = gamma if isinstance(gamma, Tensor) else torch.tensor(gamma, dtype=torch.float64)
    g = exact.to(device=q.device, dtype=dtype).reshape(1, -1, 1, 1)

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

    row = torch.cat([real, pseudo], dim=-1)
    dead = torch.isneginf(row).all(-1, keepdim=True)
    probability = torch.softmax(row.masked_fill(dead, 0.0), dim=-1)[..., :num_k].masked_fill(dead, 0.0) * seen
    lse = torch.logsumexp(row.masked_fill(dead, 0.0), dim=-1).masked_fill(dead.squeeze(-1), -math.inf)
    return probability @ v, lse
