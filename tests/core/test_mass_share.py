"""mean_pseudo_share() and its inverse, against the pseudo scores of eq. 8 one by one."""

import math

import pytest
import torch

from sm_flex.mass.share import gamma_of_share, mean_pseudo_share


def by_columns(gamma: float, length: int) -> float:
    """Rows of scores 0: N columns each, of which those behind the row are pseudo scores."""
    column = torch.arange(length, dtype=torch.float64)
    pseudo = torch.exp(-column * gamma).flip(0).cumsum(0).flip(0) - torch.exp(-column * gamma)  # of j > p
    return (pseudo / (pseudo + column + 1)).mean().item()


@pytest.mark.parametrize("length", [1, 2, 23, 4096, 5000, 70_001])
def test_it_is_the_mean_of_the_rows(length: int) -> None:
    gamma = torch.tensor([0.0, 1e-6, 1e-4, 0.004, 0.06, 0.5, 3.0, math.inf], dtype=torch.float64)
    found = mean_pseudo_share(gamma, length).tolist()
    for x, share in zip(gamma.tolist(), found, strict=True):
        expected = 0.0 if x == math.inf else by_columns(x, length)
        assert share == pytest.approx(expected, rel=1e-9 if length <= 4096 else 1e-6, abs=1e-14)
    assert found[0] == pytest.approx((length - 1) / (2 * length), rel=1e-6)


@pytest.mark.parametrize("length", [2, 23, 4096, 70_001])
def test_the_gamma_of_a_share_has_it(length: int) -> None:
    most = (length - 1) / (2 * length)
    share = torch.tensor([0.0, 1e-6, 0.01, 0.5, 0.99], dtype=torch.float64) * most
    gamma = gamma_of_share(share, length)
    assert gamma[0] == math.inf
    torch.testing.assert_close(mean_pseudo_share(gamma, length), share, rtol=1e-6, atol=1e-15)
    assert gamma_of_share(torch.tensor(most, dtype=torch.float64), length).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("share", [-0.1, 0.49, math.nan])
def test_a_share_that_no_gamma_has(share: float) -> None:
    with pytest.raises(ValueError, match=r"between 0 and \(N-1\) / 2N = 0.46875, that of gamma = 0, got"):
        gamma_of_share(torch.tensor([share]), 16)
