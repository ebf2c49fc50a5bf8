"""Mass, the form in which log M goes from a StableMask to the epilogue."""

from typing import NamedTuple

import torch
from torch import Tensor

from sm_flex.mass.closed_form import log_mass_table


class Mass(NamedTuple):
    """log M of a call: its table, or what the Triton kernel computes it from.

    The fields have the order of the ops' schema (epilogue/kernel.py), so that a Mass can be splatted into
    them.

    log_mass_HS: the table, (1|H, S) or (B, 1|H, S). Where it is given, the other fields are not used.
    gamma: 0-d or (H,), on the device of the call.
    positions: (S,) or (B, S). None: 0..S-1, restarting at every document of cu_seqlens.
    cu_seqlens: (documents + 1,), the first row of each packed document.
    length: N.
    sink_HS: the part of the table that is the sink's, the log of it, of the same kinds of shape, where the sink
        carries a value. log_mass_HS is then given, and holds the whole mass, this part included.
    sink_value_HD: that value, (H, Dv).
    """

    log_mass_HS: Tensor | None
    gamma: Tensor | None = None
    positions: Tensor | None = None
    cu_seqlens: Tensor | None = None
    length: int = 0
    sink_HS: Tensor | None = None
    sink_value_HD: Tensor | None = None

    def table(self, num_queries: int, dtype: torch.dtype) -> Tensor:
        """The table, for those who cannot compute log M themselves."""
        if self.log_mass_HS is not None:
            return self.log_mass_HS
        assert self.gamma is not None, "a Mass is a table of log M, or the gamma it follows from"
        return log_mass_table(self.gamma, self.positions, self.cu_seqlens, None, self.length, num_queries, dtype)

    def tabled(self, num_queries: int, dtype: torch.dtype) -> "Mass":
        """The same mass as a table."""
        return self if self.log_mass_HS is not None else Mass(self.table(num_queries, dtype))

    def rows(self, start: int, end: int) -> "Mass":
        """Rows start to end of a mass that is a table."""
        assert self.log_mass_HS is not None, "only a table can be cut"
        return Mass(
            _rows(self.log_mass_HS, start, end),
            sink_HS=None if self.sink_HS is None else _rows(self.sink_HS, start, end),
            sink_value_HD=self.sink_value_HD,
        )


def _rows(x: Tensor, start: int, end: int) -> Tensor:
    return x if x.shape[-1] == 1 else x[..., start:end]
