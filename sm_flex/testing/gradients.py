"""An attention and all its gradients against eq. 11: out, lse, dq, dk, dv, d gamma, and those of any further tensors."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from sm_flex.testing.oracle import oracle
from sm_flex.testing.tolerance import assert_within, assert_within_error_budget, error_budget, lse_budget

# fn(q, k, v, gamma, *extra) -> (out, lse or None)
Attention = Callable[..., tuple[Tensor, Tensor | None]]
# Keywords of the oracle beyond q, k, v and gamma: a dict, or a function of the extra tensors.
OracleKwargs = dict[str, Any] | Callable[..., dict[str, Any]]

INPUTS = ("q", "k", "v", "gamma")


def assert_matches_eq11(
    fn: Attention,
    inputs: list[Tensor],
    oracle_kwargs: OracleKwargs | None = None,
    *,
    with_lse_grad: bool = False,
    constants: Collection[str] = (),
    sums_cancel: bool = False,
    tolerance: float | None = None,
) -> None:
    """Raise AssertionError unless fn agrees with the oracle in out, lse and the gradient of every floating input.

    float64 is held to 1e-10 (or to tolerance) and to the rounding of the terms of each sum. Other dtypes are held to the
    error budget of the plain formula (tolerance.py).

    Args:
        fn: fn(q, k, v, gamma, *extra) -> (out, lse or None).
        inputs: [q, k, v, gamma, *extra].
        oracle_kwargs: the oracle's keywords beyond q, k, v and gamma: a dict, or a function of the extra tensors.
        with_lse_grad: the loss reaches lse too.
        constants: which of "q", "k", "v" and "gamma" get no gradient.
        sums_cancel: the terms of dq, dk and dv cancel, as on a problem with one visible key (P = 1, dS = 0); the sizes of
            the terms are then the measure of rounding, and not the sum that is left.
        tolerance: an absolute error in the place of the budgets, for what has none.
    """
    kwargs_of = oracle_kwargs if callable(oracle_kwargs) else lambda *extra: oracle_kwargs or {}
    dtype = inputs[0].dtype
    q, v = inputs[0], inputs[2]
    generator = torch.Generator().manual_seed(2**40)
    shape = (*q.shape[:3], v.shape[-1])
    grad_out = torch.randn(shape, generator=generator, dtype=torch.float64).to(q.device)
    grad_lse = torch.randn(shape[:3], generator=generator, dtype=torch.float64).to(q.device) if with_lse_grad else None
    actual = outputs_and_gradients(fn, inputs, grad_out.to(dtype), grad_lse, constants)

    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    options = kwargs_of(*wide[len(INPUTS) :])
    names = [f"d{name}" for name in _learned_names(wide, options, constants)]
    has_lse = len(actual) == 2 + len(names)

    def formula(in_dtype: torch.dtype) -> Attention:
        def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, *extra: Tensor) -> tuple[Tensor, Tensor | None]:
            out, lse = oracle(q, k, v, gamma=gamma, dtype=in_dtype, **kwargs_of(*extra))
            return out, lse if has_lse else None

        return run

    reference = outputs_and_gradients(formula(torch.float64), wide, grad_out.to(dtype).double(), grad_lse, constants)
    plain = outputs_and_gradients(formula(dtype), inputs, grad_out.to(dtype), grad_lse, constants)
    row_out, row_lse = oracle(*wide[:3], gamma=wide[3], **options)
    sizes = _term_magnitudes(wide, options, grad_out.to(dtype).double(), grad_lse) if sums_cancel else {}
    if dtype != torch.float64:
        row_size = (grad_out * row_out).abs().sum(-1) + (0 if grad_lse is None else grad_lse.abs())
        if "dgamma" in names:
            sizes["dgamma"] = _gamma_term_magnitude(row_size, row_lse, wide[3], options)
        if "dsink" in names:
            sizes["dsink"] = _sink_term_magnitude(row_size + _value_row_size(grad_out, options), row_lse, options["sink"])
        if "dsink_value" in names:
            sizes["dsink_value"] = _sink_value_term_magnitude(grad_out, row_lse, options)
    names = ["out", *(["lse"] if has_lse else []), *names]
    for name, a, r, p in zip(names, actual, reference, plain, strict=True):
        if dtype == torch.float64 or tolerance is not None:
            budget = lse_budget(r, dtype) if name == "lse" else 1e-10 + error_budget(r, r, dtype, row_lse, sizes.get(name, 0.0))
            assert_within(a, r, tolerance or budget, name)
            continue
        assert_within_error_budget(a, r, p, name, dtype=dtype, lse=row_lse, magnitude=sizes.get(name))
        if name == "lse":
            assert a.dtype in (torch.float32, torch.float64), f"lse is {a.dtype}, and must be float32 or float64"
            assert_within(a, r, lse_budget(r, dtype), name)


def outputs_and_gradients(
    fn: Attention, inputs: list[Tensor], grad_out: Tensor, grad_lse: Tensor | None, constants: Collection[str] = ()
) -> list[Tensor]:
    """[out, lse if fn returns one, d inputs...] of loss = <out, grad_out> + <lse, grad_lse>.

    Every floating input but the constants (names of INPUTS) has a gradient: 0 where the loss does not reach it.
    """
    leaves = [x.detach().clone().requires_grad_(i in _learned(inputs, constants)) for i, x in enumerate(inputs)]
    out, lse = fn(*leaves)
    loss = (out * grad_out.to(out.dtype)).sum()
    if grad_lse is not None and lse is not None:
        loss = loss + (lse * grad_lse.to(lse.dtype)).sum()
    learned = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(loss, learned, allow_unused=True)
    all_grads = [torch.zeros_like(x) if g is None else g for x, g in zip(learned, grads, strict=True)]
    return [out.detach(), *([] if lse is None else [lse.detach()]), *all_grads]


def _learned(inputs: list[Tensor], constants: Collection[str]) -> list[int]:
    fixed = [INPUTS.index(name) for name in constants]
    return [i for i, x in enumerate(inputs) if x.is_floating_point() and i not in fixed]


def _learned_names(inputs: list[Tensor], options: dict[str, Any], constants: Collection[str]) -> list[str]:
    """q, k, v, gamma; a further input has the name of the oracle's keyword that it is, or "extra"."""
    extra = [next((name for name, x in options.items() if x is y), "extra") for y in inputs[len(INPUTS) :]]
    names = [*INPUTS, *extra]
    return [names[i] for i in _learned(inputs, constants)]


def _term_magnitudes(
    inputs: list[Tensor], options: dict[str, Any], grad_out: Tensor, grad_lse: Tensor | None
) -> dict[str, float]:
    """The largest sum of the sizes of the terms in dq = dS k scale, dk = dS^T q scale, dv = P^T dout; dS = P (dP - delta)."""
    q, k, v, gamma = inputs[:4]
    groups, scale = q.shape[1] // k.shape[1], options.get("scale")
    unit = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:3], -1)
    without_value = {name: x for name, x in options.items() if name != "sink_value"}
    weights, _ = oracle(q, k, unit, gamma=gamma, **without_value)  # P, as an attention to unit vectors
    out, _ = oracle(q, k, v, gamma=gamma, **options)
    k, v = (x.repeat_interleave(groups, dim=1).abs() for x in (k, v))
    delta = (grad_out * out).abs().sum(-1) + (0 if grad_lse is None else grad_lse.abs())
    ds = weights * (grad_out.abs() @ v.mT + delta.unsqueeze(-1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    dk, dv = ((x.mT @ y).unflatten(1, (-1, groups)).sum(2) for x, y in ((ds, q.abs()), (weights, grad_out.abs())))
    return {"dq": (ds @ k).max().item(), "dk": dk.max().item(), "dv": dv.max().item()}


def _gamma_term_magnitude(row_size: Tensor, lse: Tensor, gamma: Tensor, options: dict[str, Any]) -> float:
    """Sum over rows of |d loss / d log M| * |d log M / d gamma|, largest head: what d gamma's rounding is relative to."""
    num_rows = lse.shape[2]
    positions, length = options.get("positions"), options.get("length", num_rows)
    positions = torch.arange(num_rows, device=lse.device) if positions is None else positions
    p = positions.reshape(-1, 1, num_rows, 1)
    column = torch.arange(length, device=lse.device)
    scores = torch.where(column > p, -column * gamma.reshape(1, -1, 1, 1), -torch.inf)
    scores = torch.where((column == 0) & (p >= length), -(p + 1) * gamma.reshape(1, -1, 1, 1), scores)
    share = torch.exp(torch.logsumexp(scores, dim=-1) - lse).nan_to_num(0.0)
    # -d log M / d gamma is the mean of the pseudo columns, which are p+1 alone from N on.
    slope = (torch.softmax(scores, dim=-1).nan_to_num(0.0) * torch.where(p >= length, p + 1, column)).sum(-1)
    terms = (share * slope * row_size).sum((0, 2))
    return (terms.sum() if gamma.dim() == 0 else terms.max()).item()


def _sink_term_magnitude(row_size: Tensor, lse: Tensor, sink: Tensor) -> float:
    """Sum over the rows that share a sink of exp(sink - lse) * |d loss / d lse|, the largest."""
    scores = sink.unsqueeze(-1) if sink.dim() == 1 else sink
    terms = torch.exp(scores - lse).nan_to_num(0.0) * row_size
    return terms.sum_to_size(scores.shape).max().item()


def _value_row_size(grad_out: Tensor, options: dict[str, Any]) -> Tensor:
    """The sizes of the terms of grad_out . v for the value v that a sink carries, (B, H, S); 0 where it carries none."""
    value = options.get("sink_value")
    if value is None:
        return torch.zeros((), device=grad_out.device)
    value = value.repeat_interleave(grad_out.shape[1] // value.shape[0], dim=0)
    return (grad_out * value.unsqueeze(-2)).abs().sum(-1)


def _sink_value_term_magnitude(grad_out: Tensor, lse: Tensor, options: dict[str, Any]) -> float:
    """Sum over the rows that share a value of exp(sink - lse) * |grad_out|, the largest."""
    sink, values = options["sink"], options["sink_value"].shape[0]
    scores = sink.unsqueeze(-1) if sink.dim() == 1 else sink
    share = torch.exp(scores - lse).nan_to_num(0.0)
    terms = (share.unsqueeze(-1) * grad_out.abs()).sum((0, 2))
    return terms.unflatten(0, (values, -1)).sum(1).max().item()
