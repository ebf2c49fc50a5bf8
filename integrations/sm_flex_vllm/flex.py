"""StableMask on vLLM's FlexAttention backend, by the hook that the backend has after its kernel: out_transform(out, lse).

Run on a CPU in the tests, with the paged cache written in plain PyTorch. Not yet run on a GPU.
"""

# pyright: reportMissingImports=false

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend, FlexAttentionImpl, FlexAttentionMetadata

from sm_flex_vllm.layer import StableMaskLayer, log_mass_of_rows


class StableMaskFlexBackend(FlexAttentionBackend):
    serves_stablemask = True

    @staticmethod
    def get_impl_cls() -> type[FlexAttentionImpl]:
        return StableMaskFlexImpl


class StableMaskFlexImpl(StableMaskLayer, FlexAttentionImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.read_settings("FLEX_ATTENTION", self.attn_type, self.alibi_slopes, serves_values=True)
        if self.stablemask is not None and self.out_transform is not None:
            raise NotImplementedError("config.stablemask is set, and the model has an out_transform of its own")
        if self.stablemask is not None and kwargs.get("sinks") is not None:  # vLLM's class would drop them
            raise NotImplementedError("config.stablemask is set, and vLLM's FLEX_ATTENTION has no learned sinks: use FLASH_ATTN")

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: FlexAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        table = None if self.stablemask is None else self.table(layer, query.device)
        if table is not None and attn_metadata is not None:
            # Both are buffers of the largest batch: the first num_reqs count.
            requests = attn_metadata.num_reqs
            starts, lengths = attn_metadata.query_start_loc[: requests + 1], attn_metadata.seq_lens[:requests]
            rows = attn_metadata.num_actual_tokens
            log_mass_HR = log_mass_of_rows(table, starts, lengths, rows, None)
            self.out_transform = lambda out, lse: self.remasked(out, lse, log_mass_HR)
        metadata: Any = attn_metadata
        return super().forward(layer, query, key, value, kv_cache, metadata, output, output_scale, output_block_scale)
