"""Shared by the tests: run a StableMask attention and the oracle on one problem, and judge every output and gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sm_flex import log_mass
from sm_flex.testing import assert_as_good_as, oracle

# fn(q, k, v, gamma, *extra) -> (out, lse or None)
Attention = Callable[..., tuple[Tensor, Tensor | None]]
# kwargs of the oracle beyond q, k, v, gamma, given the extra tensors
OracleKwargs = Callable[..., dict[str, Any]]


def gradients(fn: Attention, inputs: list[Tensor], grad_out: Tensor, grad_lse: Tensor | None) -> list[Tensor]:
    """[out, lse, d inputs...] of loss = <out, grad_out> + <lse, grad_lse>."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
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
    tolerance: float | None = None,
) -> None:
    """fn against the oracle: out, lse and the gradient of every floating input (q, k, v, gamma, then extras).

    float64 is held to an absolute 1e-10 (or tolerance), other dtypes to the budget of the plain formula.
    """
    dtype = inputs[0].dtype
    q, v = inputs[0], inputs[2]
    grad_out = torch.randn(*q.shape[:3], v.shape[-1], device=q.device, dtype=torch.float64)
    grad_lse = torch.randn(q.shape[:3], device=q.device, dtype=torch.float64) if with_lse_grad else None
    actual = gradients(fn, inputs, grad_out.to(dtype), grad_lse)
    has_lse = len(actual) == 2 + sum(x.is_floating_point() for x in inputs)

    def formula(in_dtype: torch.dtype) -> Attention:
        def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, *extra: Tensor) -> tuple[Tensor, Tensor | None]:
            out, lse = oracle(q, k, v, gamma=gamma, dtype=in_dtype, **kwargs(*extra))
            return out, lse if has_lse else None

        return run

    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    reference = gradients(formula(torch.float64), wide, grad_out.to(dtype).double(), grad_lse)
    plain = gradients(formula(dtype), inputs, grad_out.to(dtype), grad_lse)
    options = kwargs(*wide[4:])
    row_out, row_lse = oracle(*wide[:3], gamma=wide[3], **options)
    gamma_terms = _gamma_terms(row_out, row_lse, wide[3], options, grad_out, grad_lse)
    names = ["out", *(["lse"] if has_lse else []), "dq", "dk", "dv", "dgamma", "dextra"]
    for name, a, r, p in zip(names, actual, reference, plain, strict=False):
        if dtype == torch.float64 or tolerance is not None:
            torch.testing.assert_close(a.double(), r, rtol=0, atol=tolerance or 1e-10, msg=lambda m, name=name: f"{name}: {m}")
        else:
            magnitude = gamma_terms if name == "dgamma" else None
            assert_as_good_as(a, r, p, name, dtype=dtype, lse=row_lse, magnitude=magnitude)
        if name == "lse":
            assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(a.double(), r, rtol=2e-5, atol=2e-4)


def qkv(
    batch: int,
    heads: int,
    kv_heads: int,
    num_queries: int,
    num_keys: int,
    dim: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    v_dim: int | None = None,
) -> list[Tensor]:
    shapes = ((heads, num_queries, dim), (kv_heads, num_keys, dim), (kv_heads, num_keys, v_dim or dim))
    return [torch.randn(batch, *shape, dtype=torch.float32).to(device=device, dtype=dtype) for shape in shapes]


def _gamma_terms(
    out: Tensor, lse: Tensor, gamma: Tensor, options: dict[str, Any], grad_out: Tensor, grad_lse: Tensor | None
) -> float:
    """Sum over rows of |d loss / d log M| * |d log M / d gamma|, largest head: what d gamma's rounding is relative to."""
    positions, length = options.get("positions"), options.get("length", out.shape[2])
    positions = torch.arange(out.shape[2], device=out.device) if positions is None else positions
    gamma = gamma.detach().double().requires_grad_()
    log_m = log_mass(gamma, positions, length)
    share = torch.exp(log_m.detach() - lse).nan_to_num(0.0)
    size = (grad_out * out).abs().sum(-1) + (0 if grad_lse is None else grad_lse.abs())
    # d log M / d gamma is never positive, so that the sum below is one of sizes.
    weight = (share * size).sum_to_size(log_m.shape).detach()
    (terms,) = torch.autograd.grad((weight * log_m.masked_fill(torch.isneginf(log_m), 0.0)).sum(), gamma)
    return terms.abs().max().item()
