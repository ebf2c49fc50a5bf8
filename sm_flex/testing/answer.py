"""What anybody's attention is asked and answers, and how far two answers may be apart.

def fn(q, k, v, *, gamma, length, positions, visible, scale): -> out or (out, lse)

q (B, H, S, D); k, v (B, Hkv, T, D); gamma (H,), which requires grad where it is learned; length, N; positions (S,) or
(B, S) integers, or None for 0..S-1, which S = T goes with; visible (B, 1, S, T) bool, all that a query sees, or None
for key j <= i + T - S; scale of the scores, or None for 1/sqrt(D). out is like q; lse (B, H, S), float32 at least, the
natural log-sum-exp of the whole row of A_SM (eq. 8). What fn does not do it refuses with NotImplementedError, in its
forward or its backward.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sm_flex.testing.judge import assert_within, error_budget, lse_budget
from sm_flex.testing.oracle import oracle
from sm_flex.testing.request import Request

Attention = Callable[..., Tensor | tuple[Tensor, Tensor]]


class Answer(NamedTuple):
    """out and lse, and the largest error that each may have: of fn, with the true ones, or true, by the oracle."""

    out: Tensor
    lse: Tensor | None
    out_budget: float
    lse_budget: Tensor


def attend(fn: Attention, request: Request, **changes: Any) -> Answer:
    """fn's answer to the request with some of its arguments changed, of the right shape and dtype."""
    arguments = {**request.arguments, **changes}
    truth = solve(arguments)
    q, k, v = (arguments.pop(name).contiguous() for name in "qkv")
    answer = fn(q, k, v, **arguments)
    out, lse = answer if isinstance(answer, tuple) else (answer, None)
    assert out.dtype == q.dtype, f"out is {out.dtype}, and must be like q, {q.dtype}"
    assert out.shape == q.shape, f"out is {tuple(out.shape)}, and must be like q, {tuple(q.shape)}"
    if lse is not None:
        assert lse.dtype in (torch.float32, torch.float64), f"lse is {lse.dtype}, and must be float32 or float64"
        assert lse.shape == q.shape[:3], f"lse is {tuple(lse.shape)}, and must be (B, H, S), {tuple(q.shape[:3])}"
    return Answer(out.detach(), None if lse is None else lse.detach(), truth.out_budget, truth.lse_budget)


def solve(arguments: dict[str, Any]) -> Answer:
    """The oracle's answer, and the budgets of an answer in the dtype of the arguments."""
    given = dict(arguments)
    q, k, v = (given.pop(name) for name in "qkv")
    out, lse = oracle(q, k, v, **given)
    if q.dtype == torch.float64:
        return Answer(out, lse, 1e-10, lse_budget(lse, q.dtype))
    plain, _ = oracle(q, k, v, **given, dtype=q.dtype)
    return Answer(out, lse, error_budget(out, plain, q.dtype, lse), lse_budget(lse, q.dtype))


def needs_lse(answer: Answer) -> Tensor:
    if answer.lse is None:
        raise NotImplementedError("fn returns no lse")
    return answer.lse


def same(a: Answer, b: Answer, rows: slice = slice(None), name: str = "out") -> None:
    """a, cut to rows, and b are one answer, each within its own budget."""
    assert_within(a.out[:, :, rows], b.out.double(), a.out_budget + b.out_budget, name)
    if a.lse is not None and b.lse is not None:
        assert_within(a.lse[..., rows], b.lse.double(), a.lse_budget[..., rows] + b.lse_budget, f"lse of {name}")
