"""How anybody's attention is called, what it returns, and how far two results may be apart.

    def fn(q, k, v, *, gamma, length, positions, visible, scale): -> out or (out, lse)

- q (B, H, S, D); k, v (B, Hkv, T, D).
- gamma (H,), which requires grad where it is learned. length is N.
- positions (S,) or (B, S) integers, or None for 0..S-1, which S = T goes with.
- visible (B, 1, S, T) bool, all that a query sees, or None for key j <= i + T - S.
- scale of the scores, or None for 1/sqrt(D).
- out is like q. lse (B, H, S) is float32 at least: the natural log-sum-exp of the whole row of A_SM (eq. 8).

What fn does not do it refuses with NotImplementedError, in its forward or its backward.

An fn that serves sinks has one more keyword, `sink=None`: (H,), one pseudo score per head in every row, which requires
grad where it is learned. It is passed where there is one, and only to an fn whose signature names it. So is
`sink_value=None`, what that pseudo score carries: (H, D), or (Hkv, D) with one for the query heads of each key head.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sm_flex.testing.gradients import INPUTS, assert_matches_eq11
from sm_flex.testing.oracle import oracle
from sm_flex.testing.problem import Problem
from sm_flex.testing.tolerance import assert_within, error_budget, lse_budget

Attention = Callable[..., Tensor | tuple[Tensor, Tensor]]


class Output(NamedTuple):
    """out and lse, and the largest error that each may have, which follows from the oracle and the dtype."""

    out: Tensor
    lse: Tensor | None
    out_budget: float
    lse_budget: Tensor


def attend(fn: Attention, problem: Problem, **changes: Any) -> Output:
    """fn's output for the problem with some of its arguments changed, once its shapes and dtypes are seen to be right."""
    arguments = {**problem.arguments, **changes}
    expected = reference(arguments)
    q, k, v = (arguments.pop(name).contiguous() for name in "qkv")
    returned = fn(q, k, v, **arguments)
    out, lse = returned if isinstance(returned, tuple) else (returned, None)
    assert out.dtype == q.dtype, f"out is {out.dtype}, and must be like q, {q.dtype}"
    assert out.shape == q.shape, f"out is {tuple(out.shape)}, and must be like q, {tuple(q.shape)}"
    if lse is not None:
        assert lse.dtype in (torch.float32, torch.float64), f"lse is {lse.dtype}, and must be float32 or float64"
        assert lse.shape == q.shape[:3], f"lse is {tuple(lse.shape)}, and must be (B, H, S), {tuple(q.shape[:3])}"
    return Output(out.detach(), None if lse is None else lse.detach(), expected.out_budget, expected.lse_budget)


def reference(arguments: dict[str, Any]) -> Output:
    """The oracle's output in float64, and the budgets of an output in the dtype of the arguments."""
    options = dict(arguments)
    q, k, v = (options.pop(name) for name in "qkv")
    out, lse = oracle(q, k, v, **options)
    if q.dtype == torch.float64:
        return Output(out, lse, 1e-10, lse_budget(lse, q.dtype))
    plain, _ = oracle(q, k, v, **options, dtype=q.dtype)
    return Output(out, lse, error_budget(out, plain, q.dtype, lse), lse_budget(lse, q.dtype))


def require_lse(output: Output) -> Tensor:
    """Its lse, or the refusal of a law that cannot do without."""
    if output.lse is None:
        raise NotImplementedError("fn returns no lse")
    return output.lse


def assert_agree(a: Output, b: Output, rows: slice = slice(None), name: str = "out") -> None:
    """Raise AssertionError unless a, cut to rows, and b are the same, each within its own budget."""
    assert_within(a.out[:, :, rows], b.out.double(), a.out_budget + b.out_budget, name)
    if a.lse is not None and b.lse is not None:
        assert_within(a.lse[..., rows], b.lse.double(), a.lse_budget[..., rows] + b.lse_budget, f"lse of {name}")


def assert_gradients(fn: Attention, problem: Problem, learned: Collection[str] = (), **options: Any) -> None:
    """Raise AssertionError unless fn has the gradients of eq. 11; options as in assert_matches_eq11.

    learned: which of "sink" and "sink_value" require grad.
    """
    kwargs = problem.arguments
    inputs = [kwargs.pop(name) for name in INPUTS]
    extra_inputs = [kwargs.pop(name) for name in learned]

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, *extra: Tensor) -> tuple[Tensor, Tensor | None]:
        returned = fn(q, k, v, gamma=gamma, **kwargs, **dict(zip(learned, extra, strict=True)))
        return returned if isinstance(returned, tuple) else (returned, None)

    def oracle_kwargs(*extra: Tensor) -> dict[str, Any]:
        return {**kwargs, **dict(zip(learned, extra, strict=True))}

    assert_matches_eq11(run, [*inputs, *extra_inputs], oracle_kwargs, sums_cancel=True, **options)
