"""How much of a causal row a mass takes where all scores are 0, on average over the rows, and the gamma that takes so much."""

import math

import torch
from torch import Tensor

from sm_flex.mass.closed_form import closed_form

# Rows from here on are taken in blocks of an odd size, each by the row in its middle: the share is smooth on the scale of p.
EXACT, FINE = 4096, 512
STEPS = 70
LOWEST, HIGHEST = math.log(1e-12), math.log(700.0)


def mean_pseudo_share(gamma: Tensor, length: int) -> Tensor:
    """mean over p = 0..N-1 of M(p) / (M(p) + p + 1), float64, in the shape of gamma, 0-d or (H,).

    It is the share of a row that goes to the pseudo scores of eq. 8, where all real scores are 0. At gamma = inf it is 0, at
    gamma = 0 (N-1) / 2N, and it falls as gamma grows. Exact for N up to 4096, beyond that to 1e-6.

    Args:
        gamma: a floating tensor >= 0.
        length: N >= 1, the training length.

    Example:
        >>> mean_pseudo_share(torch.tensor([0.0, math.inf]), 4)
        tensor([0.3750, 0.0000], dtype=torch.float64)
    """
    positions, weights = _rows(length)
    log_m = closed_form(gamma.detach().double().cpu().reshape(-1, 1), positions, length)
    return (torch.sigmoid(log_m - (positions + 1).double().log()) @ weights).reshape(gamma.shape)


def gamma_of_share(share: Tensor, length: int) -> Tensor:
    """The gamma at which :func:`mean_pseudo_share` is share, float64, in its shape: by bisection in log gamma.

    inf where share is 0, and 0 where it is (N-1) / 2N.

    Args:
        share: a floating tensor, 0 <= share <= (N-1) / 2N.
        length: N >= 1.

    Raises:
        ValueError: a share that no gamma >= 0 has.

    Example:
        >>> gamma_of_share(torch.tensor(0.05), 64)
        tensor(0.2190, dtype=torch.float64)
    """
    most = (length - 1) / (2 * length)
    wanted = share.detach().double().cpu().reshape(-1)
    if not bool(((wanted >= 0) & (wanted <= most * (1 + 1e-9))).all()):
        raise ValueError(f"share must be between 0 and (N-1) / 2N = {most:.6g}, that of gamma = 0, got {share.tolist()}")
    low, high = torch.full_like(wanted, LOWEST), torch.full_like(wanted, HIGHEST)
    for _ in range(STEPS):
        middle = (low + high) / 2
        too_much = mean_pseudo_share(middle.exp(), length) > wanted
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    gamma = ((low + high) / 2).exp()
    gamma = torch.where(wanted == 0, math.inf, torch.where(wanted >= most, 0.0, gamma))
    return gamma.reshape(share.shape)


def _rows(length: int) -> tuple[Tensor, Tensor]:
    """Positions and their weights, which sum to 1."""
    if length <= EXACT:
        return torch.arange(length), torch.full((length,), 1 / length, dtype=torch.float64)
    edges = [*range(EXACT)]
    while edges[-1] < length:
        edges.append(min(length, edges[-1] + (edges[-1] // FINE | 1)))
    starts, ends = torch.tensor(edges[:-1]), torch.tensor(edges[1:])
    return (starts + ends - 1) // 2, (ends - starts).double() / length
