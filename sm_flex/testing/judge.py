"""The verdict: is this tensor as good as its dtype allows?

An answer in low precision is judged against the float64 reference by the error that the plain formula makes in the same
dtype: error <= 2 * error(plain) + eps * max|reference|, with eps of the answer's dtype.

A flash attention hands its log-sum-exp over in float32 and rebuilds P = exp(score - lse) from it: a rounded lse, and a
rounded score of its size, each put a relative error of eps32 * |lse| on P, which the plain softmax, having neither, does
not make (PyTorch's own causal flash attention in float32 exceeds the bound above by up to 3.4 times on small problems).
Given the reference's lse, the budget has 2 * eps32 * max(1, |lse|) * max|reference| for that; next to eps of bf16 or fp16 it
is nothing.
"""

import torch
from torch import Tensor


def error_budget(
    reference: Tensor,
    plain: Tensor,
    dtype: torch.dtype,
    lse: Tensor | None = None,
    magnitude: float | None = None,
) -> float:
    """The largest absolute error that an answer of this dtype may have; arguments as in assert_as_good_as."""
    finite = torch.isfinite(reference)
    if not finite.any():
        return 0.0
    plain_error = (plain.double() - reference)[finite].abs().max().item()
    largest = reference[finite].abs().max().item() if magnitude is None else magnitude
    budget = 2 * plain_error + torch.finfo(dtype).eps * largest
    if lse is not None and torch.isfinite(lse).any():
        size = max(1.0, lse[torch.isfinite(lse)].abs().max().item())
        budget += 2 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * size * largest
    return budget


def assert_as_good_as(
    actual: Tensor,
    reference: Tensor,
    plain: Tensor,
    name: str = "result",
    *,
    dtype: torch.dtype | None = None,
    lse: Tensor | None = None,
    magnitude: float | None = None,
) -> None:
    """Raise AssertionError unless actual is within the budget, and infinite or NaN exactly where the reference is.

    Args:
        actual: the answer under test, floating.
        reference: the same in float64, from the oracle.
        plain: the same from the oracle's formula in the dtype under test.
        name: for the message.
        dtype: whose eps counts; that of actual where None. The gradient of a float32 gamma comes from outputs in bf16.
        lse: the reference's log-sum-exp, where the answer comes from a kernel that works with one.
        magnitude: in the place of max|reference|, for a sum whose terms cancel: the sum of their sizes.
    """
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    finite = torch.isfinite(reference)
    same = actual.double().masked_fill(finite, 0.0)
    assert torch.equal(same.nan_to_num(3.0), reference.masked_fill(finite, 0.0).nan_to_num(3.0)), f"{name}: not finite elsewhere"
    if not finite.any():
        return
    error = (actual.double() - reference)[finite].abs().max().item()
    budget = error_budget(reference, plain, dtype or actual.dtype, lse, magnitude)
    assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g} ({actual.dtype})"
