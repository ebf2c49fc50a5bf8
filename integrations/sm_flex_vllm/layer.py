"""What the attention layers of every served backend share: their settings, and their table of log M."""

# pyright: reportMissingImports=false

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from sm_flex import remask
from sm_flex_vllm import settings, tables

logger = init_logger("vllm.sm_flex")  # under the root that vLLM shows


class StableMaskLayer:
    """Mixed into an AttentionImpl of vLLM. stablemask is None where the model asks for none."""

    stablemask: settings.Settings | None
    num_heads: int
    head_size: int

    def read_settings(self, backend: str, attn_type: str, alibi_slopes: Any, serves_values: bool) -> None:
        """To be called when the layer is built, before vLLM reads the weights. serves_values: the backend has a log-sum-exp."""
        config, self.stablemask, self._table, self._sink = get_current_vllm_config(), None, None, None
        if not settings.asks(config.model_config):
            return
        settings.check(config, attn_type, alibi_slopes)
        self.stablemask = settings.Settings(config)
        if self.stablemask.has_value and not serves_values:
            raise NotImplementedError(
                f'config.stablemask["sink_value"] is set, and {backend} does not serve it: its kernel returns no log-sum-exp, '
                "which says how much of the value a row gets. FLASH_ATTN and FLEX_ATTENTION serve it"
            )
        self.stablemask.check_value_dim(self.head_size)
        logger.info_once("StableMask: %s, %s", str(self.stablemask), backend)

    def table(self, layer: Any, device: torch.device) -> Tensor:
        """log M of this layer, (P, H). An AttentionImpl learns which layer it is of only when it is called, or its builder made.

        Raises:
            NotImplementedError: a kind of layer that hands its backend other rows than the sequence's.
        """
        if self._table is None:
            assert self.stablemask is not None
            if "serves_stablemask" not in vars(layer.attn_backend):
                raise NotImplementedError(
                    f"config.stablemask is set, and StableMask does not serve layers of the kind {type(layer).__name__}: they "
                    "hand the backend other rows than those of the sequence"
                )
            index = extract_layer_index(layer.layer_name)
            self._sink = self.stablemask.sink(index, self.num_heads, self.head_size, device)
            self._table = self.stablemask.table(index, self.num_heads, device)
        return self._table

    def remasked(self, out_HRD: Tensor, lse_HR: Tensor, log_mass_HR: Tensor) -> Tensor:
        """StableMask's output from causal attention's, after table()."""
        if self._sink is None:
            return remask(out_HRD, lse_HR, log_mass_HR)[0]
        return remask(out_HRD, lse_HR, log_mass_HR, sink=self._sink.level_H, sink_value=self._sink.value_HD)[0]


def served(layer: Any) -> bool:
    return any(getattr(impl, "stablemask", None) is not None for impl in layer.impl.get_impl_variants())


def log_mass_of_rows(table_PH: Tensor, query_start_loc: Tensor, seq_lens: Tensor, num_rows: int, sinks: Tensor | None) -> Tensor:
    """log M of a batch's rows, (H, R), on the device alone. The layers of one forward share the positions."""
    kept = get_forward_context().additional_kwargs.setdefault("sm_flex", {})
    key = (query_start_loc.data_ptr(), seq_lens.data_ptr(), num_rows)
    if key not in kept:
        kept[key] = tables.positions(query_start_loc, seq_lens, num_rows).clamp(max=table_PH.shape[0] - 1)
    return tables.add_sinks(table_PH[kept[key]], sinks).t()
