"""How a step of vLLM's CPU backend is cut, so that its kernel, whose sinks are one number per head and call, serves StableMask.

A row of its own (a decode step) is one call, with log M of its position as the sinks: that is eq. 11, exactly.

Rows of a prompt would be many calls. Two are enough, whatever the rows: one without sinks gives o = n / Z of each row, one with
any sink c per head gives o_c = n / (Z + e^c), of the same values n. So R = |o_c| / |o| = Z / (Z + e^c), and the share of the real
scores, s = Z / (Z + M), is

    s = R / (R + (1 - R) e^(log M - c))

With c the largest log M of the call's rows the error of s is that of R, a few roundings of the kernel's own output. The second
call is made only for heads of which some row's mass can still change the output.

Dimension letters: R rows, H query heads, D head dim.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# A request of so few rows is a call a row.
FEW_ROWS = 2
# Of a long prompt the heads that need the second call are asked for every so many rows: the mass fades with the position.
TILE_ROWS = 128
# 1 - s below this leaves s * o as it is: half an ulp of 1.
HALF_ULP = {torch.float32: 2.0**-25, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}


class Tile(NamedTuple):
    """Rows [first, last) of the batch: whole requests, or some rows of one. Requests [request, request + len(ends))."""

    first: int
    last: int
    request: int
    starts: list[int]  # the first row of each request, counted from `first`, and the end
    ends: list[int]  # the keys that each request's last row in the tile sees


class Cut(NamedTuple):
    """Rows that are calls of their own, as (row, request, position), and runs of requests that are two calls each."""

    rows: list[tuple[int, int, int]]
    runs: list[Tile]


def cut(starts: list[int], lengths: list[int]) -> Cut:
    """A batch's requests by the number of their rows.

    Args:
        starts: the first row of each request, and the end of the last.
        lengths: the tokens of each request, those of this step included.
    """
    rows: list[tuple[int, int, int]] = []
    runs: list[Tile] = []
    for request, length in enumerate(lengths):
        first, last = starts[request], starts[request + 1]
        if last - first <= FEW_ROWS:
            rows += [(row, request, length - (last - row)) for row in range(first, last)]
        elif runs and runs[-1].request + len(runs[-1].ends) == request:
            runs[-1] = _extended(runs[-1], last, length)
        else:
            runs.append(Tile(first, last, request, [0, last - first], [length]))
    return Cut(rows, runs)


def tiles(run: Tile) -> list[Tile]:
    """The parts of a run of at most TILE_ROWS rows: neighbouring requests together, or some rows of a long one."""
    found: list[Tile] = []
    for i, end in enumerate(run.ends):
        first, last, request = run.first + run.starts[i], run.first + run.starts[i + 1], run.request + i
        previous = found[-1] if found else None
        if previous and last - previous.first <= TILE_ROWS and previous.last == first:
            found[-1] = _extended(previous, last, end)
            continue
        for a in range(first, last, TILE_ROWS):
            b = min(a + TILE_ROWS, last)
            found.append(Tile(a, b, request, [0, b - a], [end - (last - b)]))
    return found


def _extended(tile: Tile, last: int, end: int) -> Tile:
    return Tile(tile.first, last, tile.request, [*tile.starts, last - tile.first], [*tile.ends, end])


def row_positions(tile: Tile) -> Tensor:
    """The position of each row of a tile, int64 (R,)."""
    spans = zip(tile.starts, tile.starts[1:], tile.ends, strict=False)
    return torch.cat([torch.arange(end - (b - a), end) for a, b, end in spans])


def real_share(out_RHD: Tensor, out_c_RHD: Tensor, log_mass_RH: Tensor, c_H: Tensor) -> Tensor:
    """s of each row, float32 (R, H), from the kernel's output without sinks and with the sinks c, the rows' largest log M."""
    norm, norm_c = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in (out_RHD, out_c_RHD))
    # An output of 0 stays 0 whatever the share.
    ratio = torch.where(norm > 0, norm_c / norm, 1.0).clamp(max=1.0)
    # c is finite: the sink of a head without mass is a number that adds nothing.
    return ratio / (ratio + (1 - ratio) * torch.exp(log_mass_RH - c_H))


def heads_that_need_it(log_mass_RH: Tensor, least_lse_RH: Tensor | None, dtype: torch.dtype) -> list[bool]:
    """For each head: whether the mass of some row can change an output of that dtype. least_lse bounds its lse from below."""
    if least_lse_RH is None:
        return (log_mass_RH > -torch.inf).any(0).tolist()
    # 1 - s = M / (e^lse + M) <= e^(log M - lse)
    return ((log_mass_RH - least_lse_RH).exp() > HALF_ULP[dtype]).any(0).tolist()


class Earlier(NamedTuple):
    """Keys of the same step and request that every row of a tile sees: their mean, float32 (K, D), and how many they are."""

    mean_KD: Tensor
    keys: int


def with_these(earlier: Earlier | None, key_RKD: Tensor) -> Earlier:
    """And the keys of the tile itself, for the next one."""
    mean, count = earlier or (torch.zeros(key_RKD.shape[1:]), 0)
    total = count + key_RKD.shape[0]
    return Earlier((mean * count + key_RKD.sum(0, dtype=torch.float32)) / total, total)


def least_lse(query_RHD: Tensor, key_RKD: Tensor, scale: float, earlier: Earlier | None = None) -> Tensor:
    """A lower bound of each row's log-sum-exp, float32 (R, H), from some of the keys that the row sees.

    It sees its own key, so lse >= its own score. By Jensen's inequality lse >= log m + the mean score of m keys, which is the
    score with their mean. In float32, as the kernel's scores: products that bfloat16 rounds are no bound.
    """
    rows, heads, dim = query_RHD.shape
    grouped = query_RHD.float().view(rows, key_RKD.shape[1], -1, dim)
    lse = (grouped * key_RKD.unsqueeze(2)).sum(-1) * scale
    if earlier is not None:
        of_mean = (grouped * earlier.mean_KD.unsqueeze(1)).sum(-1) * scale
        lse = torch.maximum(lse, of_mean + math.log(earlier.keys))
    return lse.view(rows, heads)


def soft_capped(scores: Tensor, soft_cap: float) -> Tensor:
    return torch.tanh(scores / soft_cap) * soft_cap


def kv_heads_of(needed: list[bool], group: int) -> tuple[int, int] | None:
    """The kv heads [first, last) that hold every query head that is needed, `group` query heads to a kv head."""
    kv_heads = [head // group for head, need in enumerate(needed) if need]
    return (kv_heads[0], kv_heads[-1] + 1) if kv_heads else None
