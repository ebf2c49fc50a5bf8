"""How far may an answer be from the truth? As far as its dtype makes the plain formula be.

An answer in low precision is held against the float64 reference by the error that the plain formula makes in the same
dtype: error <= 2 * error(plain) + eps * max|reference|, with eps of the answer's dtype.

A flash attention hands its log-sum-exp over in float32 and rebuilds P = exp(score - lse) from it: a rounded lse, and a
rounded score of its size, each put a relative error of eps32 * |lse| on P. The plain softmax has neither, and makes no such
error (PyTorch's own causal flash attention in float32 exceeds the bound above by up to 3.4 times on small problems). Given
the reference's lse, the budget has 2 * eps32 * max(1, |lse|) * max|reference| for that; next to eps of bf16 or fp16 it is
nothing.
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
    """The largest absolute error that an answer of this dtype may have; arguments as in assert_within_error_budget."""
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


def assert_within_error_budget(
    actual: Tensor,
    reference: Tensor,
    plain: Tensor,
    name: str = "result",
    *,
    dtype: torch.dtype | None = None,
    lse: Tensor | None = None,
    magnitude: float | None = None,
) -> None:
    """Raise AssertionError unless actual is within error_budget, and infinite or NaN exactly where the reference is.

    Args:
        actual: the answer under test, floating.
        reference: the same in float64, from the oracle.
        plain: the same from the oracle's formula in the dtype under test.
        name: for the message.
        dtype: whose eps counts; that of actual where None. The gradient of a float32 gamma comes from outputs in bf16.
        lse: the reference's log-sum-exp, where the answer comes from a kernel that works with one.
        magnitude: in the place of max|reference|, for a sum whose terms cancel: the sum of their sizes.
    """
    assert_within(actual, reference, error_budget(reference, plain, dtype or actual.dtype, lse, magnitude), name)


def assert_within(actual: Tensor, reference: Tensor, budget: float | Tensor, name: str = "result") -> None:
    """Raise AssertionError unless |actual - reference| <= budget (an absolute error, for all or for each), and infinite or
    NaN exactly where the reference is."""
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    finite = torch.isfinite(reference)
    not_finite = actual.double().masked_fill(finite, 0.0)
    expected = reference.double().masked_fill(finite, 0.0)
    assert torch.equal(not_finite.nan_to_num(3.0), expected.nan_to_num(3.0)), f"{name}: not finite elsewhere"
    error = (actual.double() - reference.double()).abs().masked_fill(~finite, 0.0)
    excess = error - budget
    if not finite.any() or bool((excess <= 0).all()):
        return
    worst = excess.nan_to_num(torch.inf).argmax()
    allowed = torch.as_tensor(budget).expand_as(error).flatten()[worst].item()
    raise AssertionError(f"{name}: error {error.flatten()[worst].item():.3g}, budget {allowed:.3g} ({actual.dtype})")


def lse_budget(reference: Tensor, dtype: torch.dtype) -> Tensor:
    """The absolute error that the log-sum-exp of each row may have, for inputs of this dtype.

    It is float32 at least whatever the inputs are: 2e-5 of its size and 2e-4; 1e-10 and its own rounding in float64.
    """
    size = reference.abs().masked_fill(~torch.isfinite(reference), 0.0)
    if dtype == torch.float64:
        return 1e-10 + 4 * torch.finfo(dtype).eps * size
    return 2e-4 + 2e-5 * size
