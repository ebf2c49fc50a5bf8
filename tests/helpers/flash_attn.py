"""flash-attn's attention for one sequence, typed from its docstrings with one column for each score, and options to draw."""

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sm_flex.testing import oracle

# A StableMask's settings beside the options of flash-attn.
MASKED: list[dict[str, Any]] = [
    {},
    {"window_size": (4, 0)},
    {"window_size": (-1, 0), "softmax_scale": 0.3},
    {"softcap": 2.0},
    {"alibi_slopes": torch.tensor([0.3, 0.1, 0.0, 0.5])},
    {"softcap": 2.0, "window_size": (3, -1), "alibi_slopes": torch.tensor([0.3, 0.1, 0.0, 0.5])},
]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    stablemask: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """out (S, H, Dv) and the log-sum-exp (H, S) of one sequence: q (S, H, D), k and v (T, Hkv, D).

    stablemask: the oracle's keywords gamma, length, positions and sink, for eq. 11 on these scores.
    """
    num_queries, heads, dim = q.shape
    num_keys, groups = k.shape[0], heads // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    raw = torch.einsum("ihd,jhd->hij", q, k) * (dim**-0.5 if softmax_scale is None else softmax_scale)
    scores = softcap * torch.tanh(raw / softcap) if softcap > 0 else raw
    slot = torch.arange(num_queries)[:, None] + num_keys - num_queries
    key = torch.arange(num_keys)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[:, None, None] * (slot - key).abs()
    left, right = window_size
    if causal:
        right = 0
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if left >= 0:
        seen = seen & (key >= slot - left)
    if right >= 0:
        seen = seen & (key <= slot + right)
    if stablemask is not None:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        options = {"bias": scores - raw, "visible": seen, "scale": softmax_scale}
        out, lse = oracle(q, k, v, **options, **stablemask)
        return out[0].transpose(0, 1), lse[0]
    row = scores.masked_fill(~seen, -math.inf)
    if learnable_sink is not None:
        row = torch.cat([row, learnable_sink[:, None, None].expand(-1, num_queries, 1).to(row.dtype)], dim=-1)
    nothing = torch.isneginf(row).all(-1, keepdim=True)
    weights = torch.softmax(row.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)[..., :num_keys]
    lse = torch.logsumexp(row.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing.squeeze(-1), -math.inf)
    return torch.einsum("hij,jhd->ihd", weights, v), lse


@st.composite
def options(draw: st.DrawFn, heads: int, rows: int) -> dict[str, Any]:
    """Every option that changes the output, each as often absent as present. rows: for slopes (rows, H)."""
    found: dict[str, Any] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        found["window_size"] = draw(st.tuples(*[st.sampled_from((-1, 0, 1, 4, 40))] * 2))
    if draw(st.booleans()):
        found["softmax_scale"] = 0.3
    if draw(st.integers(0, 3)) == 0:
        found["softcap"] = 1.5
    if draw(st.integers(0, 3)) == 0:
        found["alibi_slopes"] = torch.rand(heads) if draw(st.booleans()) else torch.rand(rows, heads)
    if draw(st.integers(0, 3)) == 0:
        found["learnable_sink"] = torch.randn(heads, dtype=torch.float64, requires_grad=True)
    return found


def rows_of(found: dict[str, Any], n: int) -> dict[str, Any]:
    """The options of one sequence."""
    slopes = found.get("alibi_slopes")
    return {**found, "alibi_slopes": slopes[n]} if slopes is not None and slopes.dim() == 2 else found
