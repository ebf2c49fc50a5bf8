"""How strong a sink is: the constant mass that takes as much of each row as the first token does."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sm_flex.diagnostics.calls import read
from sm_flex.engines import dense
from sm_flex.runtime import no_autocast
from sm_flex.score_mod import StableMask

STEPS = 80  # halvings of an interval of at most some thousands: below float64's own step


class SinkRows(NamedTuple):
    """Rows of a call, float64, (B, H, R): the share of the first token, that of all else, and the log-sum-exp of all else.

    Both shares, since 1 - share is 0 beside a share near 1.
    """

    share: Tensor
    rest: Tensor
    others: Tensor


def sink_level(
    query: Tensor,
    key: Tensor,
    mask: StableMask | None = None,
    *,
    rows: tuple[int, int] = (64, 256),
    scale: float | None = None,
    visible: Tensor | BlockMask | None = None,
) -> Tensor:
    """The level of each head's attention sink: the constant log mass that would stand in for its first token.

    With that mass in place of the first token, a row gives it the share e^level / (e^level + sum of e^score
    of the others). The level is the one at which the mean of these shares, over the rows and the batch, is
    the mean share that the first token has. It is what ``stablemask(math.inf, length=N, sink=level)`` takes.

    Args:
        query: (B, H, S, D). key: (B, Hkv, S, D), with H a multiple of Hkv; slot 0 is the first token.
        mask: the StableMask of the call, whose inner score_mod acts on the real scores, and whose mass is
            among the others; None for plain causal attention.
        rows: (first, end) of the rows looked at; an end beyond S is S. Early rows have few others, and would
            be heard most.
        scale: of the scores, 1/sqrt(D) where None.
        visible: as for :func:`sm_flex.diagnostics.attention_map`.

    Returns:
        (H,) float64. -inf for a head whose first token has no attention at all, +inf for one that gives it
        everything (no mass is a sink for that). Computed in float64 whatever the inputs are, in blocks of
        rows: no S x S tensor.

    Raises:
        TypeError, ValueError, NotImplementedError: as the drop-ins, naming the argument, the rule, what came
            and the way out; rows that the call does not have.

    Example:
        >>> q, k = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
        >>> k[:, :, 0] = 1.0  # a score of 2, beside zeros
        >>> round(sink_level(q, k, rows=(2, 4)).item(), 6)
        2.0
    """
    return level_of(sink_rows(query, key, mask, rows=rows, scale=scale, visible=visible))


def sink_rows(
    query: Tensor,
    key: Tensor,
    mask: StableMask | None,
    *,
    rows: tuple[int, int],
    scale: float | None,
    visible: Tensor | BlockMask | None,
) -> SinkRows:
    """What :func:`level_of` needs of a call; the rows of several can be put together."""
    call = read(query, key, mask, scale, visible, None)
    (batch, heads, num_rows, _), num_keys = call.query.shape, call.key.shape[2]
    if num_rows != num_keys:
        raise ValueError(f"query and key must have one length: slot 0 is the first token, got S={num_rows} and T={num_keys}")
    start, end = _checked_rows(rows, num_rows)
    found = SinkRows(*(torch.empty(batch, heads, end - start, dtype=torch.float64, device=call.query.device) for _ in range(3)))
    with torch.no_grad(), no_autocast(call.query.device):
        score_mod = None if call.mask is None else call.mask.score_mod
        q, k, mass = call.query.double(), call.key.double(), call.log_mass.double()
        weigh = dense.weights_by_rows(call.rows, scale=call.scale, score_mod=score_mod)
        for first, last in dense.row_blocks(batch, heads, end - start, num_keys):
            at, keys = slice(start + first, start + last), start + last
            weights, lse = weigh(q[:, :, at], k[:, :, :keys], start + first)
            whole = torch.logaddexp(lse, mass[..., at].expand_as(lse))
            seen = whole.masked_fill(whole.isneginf(), 0.0)  # a fully masked row has no share, and no others
            real = (lse - seen).exp()
            found.share[:, :, first:last] = weights[..., 0] * real
            found.rest[:, :, first:last] = rest = weights[..., 1:].sum(-1) * real + (mass[..., at] - seen).exp()
            found.others[:, :, first:last] = whole + rest.log()
    return found


def level_of(rows: SinkRows) -> Tensor:
    """The level (H,) at which the mean of sigmoid(level - others) is the mean share, by bisection."""
    share, rest, others = [x.transpose(0, 1).flatten(1) for x in rows]
    counts = (share + rest > 0).double()  # not rows that see nothing
    counts = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    share, rest, finite = (share * counts).sum(-1), (rest * counts).sum(-1), others.isfinite()
    # The rows' shares are all below the mean at the first of these, and all above it at the second.
    logit = (share.log() - rest.log()).clamp(-1e4, 1e4)
    low = others.masked_fill(~finite, math.inf).amin(-1) + logit
    high = others.masked_fill(~finite, -math.inf).amax(-1) + logit
    alone = ((counts > 0) & ~finite).any(-1)  # rows of the first token alone, which give all to any mass
    low = torch.where(alone, low - 1e4, low)
    for _ in range(STEPS):
        middle = (low + high) / 2
        away = middle[:, None] - others
        # The smaller of the two shares is the one that float64 can tell.
        mean_share, mean_rest = [(torch.sigmoid(x) * counts).sum(-1) for x in (away, -away)]
        below = torch.where(share < rest, mean_share < share, mean_rest > rest)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    level = torch.where(finite.any(-1), (low + high) / 2, math.inf)
    return torch.where(share == 0, -math.inf, level)


def _checked_rows(rows: tuple[int, int], num_rows: int) -> tuple[int, int]:
    whole = isinstance(rows, tuple) and len(rows) == 2 and all(isinstance(x, int) and not isinstance(x, bool) for x in rows)
    if not whole:
        raise TypeError(f"rows must be a pair of ints, the first row and the end, got {rows!r}")
    start, end = rows[0], min(rows[1], num_rows)
    if not 1 <= start < rows[1]:
        raise ValueError(f"rows must begin at 1 or later and end after that, got {rows}: row 0 sees the first token alone")
    if start >= end:
        raise ValueError(f"rows {rows} are not among the {num_rows} rows of the call: pass earlier ones, or a longer text")
    return start, end
