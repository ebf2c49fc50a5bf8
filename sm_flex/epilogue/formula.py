"""The real share s of a row (alpha_i in section 4.2), its complement, and the log-sum-exp of the whole row.

    s = sigmoid(lse - log M),   lse' = logaddexp(lse, log M)

A fully masked row sees no key: lse = -inf. Its s is 0, also where log M = -inf too.

Where a sink carries a value v, log M is the whole mass, the sink's part included, and the row has a third share:

    p_sink = exp(sink - lse'),   out' = s * out + p_sink * v

Shapes: lse is (B, H, S), log M and the sink broadcastable to it, v (H, D).
"""

import torch
from torch import Tensor


def real_share_and_lse(
    lse: Tensor, log_mass: Tensor, *, may_be_masked: bool = True, return_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """s and lse'. may_be_masked=False, where no row is fully masked, takes half the time."""
    if may_be_masked:
        masked = torch.isneginf(lse)
        share = torch.sigmoid(lse.masked_fill(masked, 0.0) - log_mass).masked_fill(masked, 0.0)
        return share, torch.logaddexp(lse, log_mass) if return_lse else None
    share = torch.sigmoid(lse - log_mass)
    return share, torch.logaddexp(lse, log_mass) if return_lse else None


def times_share(out: Tensor, share: Tensor, lse: Tensor, *, may_be_masked: bool = True) -> Tensor:
    """s * out, and 0 in a fully masked row whatever out holds there: 0 * NaN would be NaN."""
    product = out * share.unsqueeze(-1).to(out.dtype)
    # In place: out of place, masked_fill lays it out anew, and the backward of cuDNN counts on out's memory.
    return product.masked_fill_(torch.isneginf(lse).unsqueeze(-1), 0.0) if may_be_masked else product


def times_share_plus_value(
    out: Tensor, share: Tensor, lse: Tensor, sink_share: Tensor, sink_value_HD: Tensor, *, may_be_masked: bool = True
) -> Tensor:
    """s * out + p_sink * v, rounded to out's dtype once. A fully masked row is p_sink * v, whatever out holds there."""
    wide = times_share(out.to(share.dtype), share, lse, may_be_masked=may_be_masked)
    return wide.addcmul_(sink_share.unsqueeze(-1), sink_value_HD.unsqueeze(-2)).to(out.dtype)


def pseudo_share(new_lse: Tensor, log_mass: Tensor) -> Tensor:
    """1 - s = exp(log M - lse'), accurate where s rounds to 1."""
    return exp_difference(log_mass, new_lse)


def exp_difference(a: Tensor, b: Tensor) -> Tensor:
    """exp(a - b), but 0 where a is -inf, even where b is too (a fully masked row has b = -inf)."""
    zero = torch.isneginf(a)
    return torch.exp(a.masked_fill(zero, 0.0) - b).masked_fill(zero | torch.isneginf(b), 0.0)
