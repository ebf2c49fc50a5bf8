"""log M by position, as a table that kernels take the sinks of their rows from, and the positions of a batch's rows.

Nothing here needs vLLM. Dimension letters: P positions, H query heads of this rank, R rows (tokens) of a batch.
"""

import functools

import torch
from torch import Tensor

from sm_flex import log_mass


@functools.lru_cache(maxsize=64)
def table(gamma: tuple[float, ...], length: int, sink: tuple[float, ...] | None, size: int, device: torch.device) -> Tensor:
    """log(M + e^sink), float32 (P, H): the mass that the query at position p has beside its real scores. Shared: read only.

    Args:
        gamma: one for each query head of this rank.
        length: N, the training length.
        sink: one for each query head of this rank, -inf for none; None where none has one.
        size: P, the positions that the engine may reach.
    """
    gamma_H = torch.tensor(gamma, dtype=torch.float64)
    log_mass_PH = log_mass(gamma_H, torch.arange(size), length).t()
    if sink is not None:
        log_mass_PH = torch.logaddexp(log_mass_PH, torch.tensor(sink, dtype=torch.float64))
    return log_mass_PH.float().contiguous().to(device)


def add_sinks(log_mass_RH: Tensor, sinks_H: Tensor | None) -> Tensor:
    """log(M + e^sink): the mass of a row beside its layer's learned sinks."""
    return log_mass_RH if sinks_H is None else torch.logaddexp(log_mass_RH, sinks_H.to(log_mass_RH.dtype))


def positions(query_start_loc: Tensor, seq_lens: Tensor, num_rows: int) -> Tensor:
    """The position of each row in its own sequence, int64 (R,): row r of request i is at seq_lens[i] - (its end - r).

    Only operations on the device, of a size that num_rows and the two tensors fix: it can be captured in a CUDA graph. Rows
    beyond the last request, which are padding, get some position that is not negative.

    Args:
        query_start_loc: (requests + 1,), the first row of each request, and the end of the last.
        seq_lens: (requests,), each request's tokens, those of this step included.
    """
    rows = torch.arange(num_rows, device=query_start_loc.device, dtype=query_start_loc.dtype)
    request = torch.searchsorted(query_start_loc, rows, right=True) - 1
    request = request.clamp(max=seq_lens.shape[0] - 1)
    ends = query_start_loc[1:][request]
    return (seq_lens[request] - (ends - rows)).clamp(min=0).long()
