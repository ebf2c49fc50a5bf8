"""An attention and all its gradients against eq. 11: out, lse, dq, dk, dv, d gamma, and those of any further tensors."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from sm_flex.testing.judge import assert_as_good_as, assert_within, error_budget, lse_budget
from sm_flex.testing.oracle import oracle

# fn(q, k, v, gamma, *extra) -> (out, lse or None)
Attention = Callable[..., tuple[Tensor, Tensor | None]]
# kwargs of the oracle beyond q, k, v, gamma, given the extra tensors
OracleKwargs = Callable[..., dict[str, Any]]

GAMMA = 3  # where gamma stands among the inputs


def gradients(
    fn: Attention, inputs: list[Tensor], grad_out: Tensor, grad_lse: Tensor | None, constants: Collection[int] = ()
) -> list[Tensor]:
    """[out, lse, d inputs...] of loss = <out, grad_out> + <lse, grad_lse>; without those of the inputs that are constants."""
    learned = [x.is_floating_point() and i not in constants for i, x in enumerate(inputs)]
    leaves = [x.detach().clone().requires_grad_(wanted) for x, wanted in zip(inputs, learned, strict=True)]
    out, lse = fn(*leaves)
    loss = (out * grad_out.to(out.dtype)).sum()
    if grad_lse is not None and lse is not None:
        loss = loss + (lse * grad_lse.to(lse.dtype)).sum()
    wanted = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)]
    return [out.detach(), *([] if lse is None else [lse.detach()]), *found]


def check(
    fn: Attention,
    inputs: list[Tensor],
    kwargs: OracleKwargs = lambda *extra: {},
    *,
    with_lse_grad: bool = False,
    learned_gamma: bool = True,
    by_terms: bool = False,
    tolerance: float | None = None,
) -> None:
    """Raise AssertionError unless fn agrees with the oracle in out, lse and the gradient of every floating input.

    float64 is held to an absolute 1e-10 (or tolerance; and its own rounding of the terms, where those are the measure), other
    dtypes to the budget of the plain formula.

    Args:
        fn: fn(q, k, v, gamma, *extra) -> (out, lse or None).
        inputs: [q, k, v, gamma, *extra].
        kwargs: given the extra tensors, the oracle's keywords beyond q, k, v and gamma.
        with_lse_grad: let the loss reach lse too.
        learned_gamma: give gamma a gradient.
        by_terms: dq, dk and dv are sums whose terms cancel on a small problem (one visible key: P = 1, dS = 0); let the sizes
            of the terms be the measure of rounding, not the sum that is left.
        tolerance: instead of the budgets, for what has none.
    """
    dtype = inputs[0].dtype
    q, v = inputs[0], inputs[2]
    generator = torch.Generator().manual_seed(2**40)
    shape = (*q.shape[:3], v.shape[-1])
    grad_out = torch.randn(shape, generator=generator, dtype=torch.float64).to(q.device)
    grad_lse = torch.randn(shape[:3], generator=generator, dtype=torch.float64).to(q.device) if with_lse_grad else None
    constants = () if learned_gamma else (GAMMA,)
    actual = gradients(fn, inputs, grad_out.to(dtype), grad_lse, constants)
    learned = [x for i, x in enumerate(inputs) if x.is_floating_point() and i not in constants]
    has_lse = len(actual) == 2 + len(learned)

    def formula(in_dtype: torch.dtype) -> Attention:
        def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, *extra: Tensor) -> tuple[Tensor, Tensor | None]:
            out, lse = oracle(q, k, v, gamma=gamma, dtype=in_dtype, **kwargs(*extra))
            return out, lse if has_lse else None

        return run

    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    reference = gradients(formula(torch.float64), wide, grad_out.to(dtype).double(), grad_lse, constants)
    plain = gradients(formula(dtype), inputs, grad_out.to(dtype), grad_lse, constants)
    options = kwargs(*wide[4:])
    row_out, row_lse = oracle(*wide[:3], gamma=wide[GAMMA], **options)
    names = ["out", *(["lse"] if has_lse else []), "dq", "dk", "dv", *(["dgamma"] if learned_gamma else []), "dextra"]
    terms = _terms(wide, options, grad_out.to(dtype).double(), grad_lse) if by_terms else {}
    if learned_gamma and dtype != torch.float64:
        terms["dgamma"] = _gamma_terms(row_out, row_lse, wide[GAMMA], options, grad_out, grad_lse)
    for name, a, r, p in zip(names, actual, reference, plain, strict=False):
        if dtype == torch.float64 or tolerance is not None:
            budget = lse_budget(r, dtype) if name == "lse" else 1e-10 + error_budget(r, r, dtype, row_lse, terms.get(name, 0.0))
            assert_within(a, r, tolerance or budget, name)
            continue
        assert_as_good_as(a, r, p, name, dtype=dtype, lse=row_lse, magnitude=terms.get(name))
        if name == "lse":
            assert a.dtype in (torch.float32, torch.float64), f"lse is {a.dtype}, and must be float32 or float64"
            assert_within(a, r, lse_budget(r, dtype), name)


def _terms(inputs: list[Tensor], options: dict[str, Any], grad_out: Tensor, grad_lse: Tensor | None) -> dict[str, float]:
    """The largest sum of the sizes of the terms in dq = dS k scale, dk = dS^T q scale, dv = P^T dout; dS = P (dP - delta)."""
    q, k, v, gamma = inputs[:4]
    groups, scale = q.shape[1] // k.shape[1], options.get("scale")
    unit = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:3], -1)
    weights, _ = oracle(q, k, unit, gamma=gamma, **options)  # P, as an attention to unit vectors
    out, _ = oracle(q, k, v, gamma=gamma, **options)
    k, v = (x.repeat_interleave(groups, dim=1).abs() for x in (k, v))
    delta = (grad_out * out).abs().sum(-1) + (0 if grad_lse is None else grad_lse.abs())
    ds = weights * (grad_out.abs() @ v.mT + delta.unsqueeze(-1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    sizes = {"dq": ds @ k, "dk": ds.mT @ q.abs(), "dv": weights.mT @ grad_out.abs()}
    return {
        name: (x if name == "dq" else x.unflatten(1, (-1, groups)).sum(2)).max().item() for name, x in sizes.items()
    }  # fmt: skip


def _gamma_terms(
    out: Tensor, lse: Tensor, gamma: Tensor, options: dict[str, Any], grad_out: Tensor, grad_lse: Tensor | None
) -> float:
    """Sum over rows of |d loss / d log M| * |d log M / d gamma|, largest head: what d gamma's rounding is relative to."""
    positions, length = options.get("positions"), options.get("length", out.shape[2])
    positions = torch.arange(out.shape[2], device=out.device) if positions is None else positions
    p = positions.reshape(-1, 1, out.shape[2], 1)
    column = torch.arange(length, device=out.device)
    scores = torch.where(column > p, -column * gamma.reshape(1, -1, 1, 1), -torch.inf)
    scores = torch.where((column == 0) & (p >= length), -(p + 1) * gamma.reshape(1, -1, 1, 1), scores)
    share = torch.exp(torch.logsumexp(scores, dim=-1) - lse).nan_to_num(0.0)
    # -d log M / d gamma is the mean of the pseudo columns, which are p+1 alone from N on.
    slope = (torch.softmax(scores, dim=-1).nan_to_num(0.0) * torch.where(p >= length, p + 1, column)).sum(-1)
    size = (grad_out * out).abs().sum(-1) + (0 if grad_lse is None else grad_lse.abs())
    terms = (share * slope * size).sum((0, 2))
    return (terms.sum() if gamma.dim() == 0 else terms.max()).item()
