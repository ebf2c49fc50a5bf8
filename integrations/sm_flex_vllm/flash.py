"""StableMask on vLLM's FlashAttention backend: the kernel's own log-sum-exp, then sm_flex's remask.

Run on a CPU in the tests, with the kernel in plain PyTorch. Not yet run on a GPU.
"""

# pyright: reportMissingImports=false

from typing import Any

from torch import Tensor
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides, is_quantized_kv_cache
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl, FlashAttentionMetadata

from sm_flex_vllm.layer import StableMaskLayer, log_mass_of_rows


class StableMaskFlashBackend(FlashAttentionBackend):
    serves_stablemask = True

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return StableMaskFlashImpl


class StableMaskFlashImpl(StableMaskLayer, FlashAttentionImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.read_settings("FLASH_ATTN", self.attn_type, self.alibi_slopes, serves_values=True)
        if self.stablemask is not None and current_platform.is_rocm():
            raise NotImplementedError("config.stablemask is set, and FLASH_ATTN does not serve it on ROCm: use FLEX_ATTENTION")
        if self.stablemask is not None and is_quantized_kv_cache(self.kv_cache_dtype):
            raise NotImplementedError(
                f"config.stablemask is set, and FLASH_ATTN does not serve it with kv_cache_dtype={self.kv_cache_dtype!r}: "
                "leave it at auto"
            )

    def attend(self, **call: Any) -> Tensor:
        """The kernel: causal attention into call["out"], without sinks; its log-sum-exp, natural, (H, R)."""
        version = self.vllm_flash_attn_version
        return fa_utils.flash_attn_varlen_func(return_softmax_lse=True, fa_version=version, **call)[1]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: FlashAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        metadata: Any = attn_metadata
        table_PH = None if self.stablemask is None else self.table(layer, query.device)
        if table_PH is None or metadata is None:
            return super().forward(layer, query, key, value, kv_cache, metadata, output, output_scale, output_block_scale)
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization is not supported by vLLM's FlashAttention backend")
        if metadata.causal is not True or metadata.mm_prefix_query_range_tensor is not None:
            raise NotImplementedError("StableMask is causal, and vLLM asks for attention that is not")
        rows = metadata.num_actual_tokens
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        out, length, table, splits = output[:rows], metadata.max_seq_len, metadata.block_table, metadata.max_num_splits
        if self.fa4_hd256:  # as vLLM calls that kernel: whole pages, no splits
            pages = cdiv(length, fa_utils.FA4_HD256_PAGE_SIZE)
            length, table, splits = pages * fa_utils.FA4_HD256_PAGE_SIZE, table[:, :pages], 1
        lse_HR = self.attend(
            q=query[:rows],
            k=canonicalize_singleton_dim_strides(keys),
            v=canonicalize_singleton_dim_strides(values),
            out=out,
            cu_seqlens_q=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len,
            seqused_k=metadata.seq_lens,
            max_seqlen_k=length,
            softmax_scale=self.scale,
            causal=True,
            alibi_slopes=None,
            window_size=list(self.sliding_window),
            block_table=table,
            softcap=self.logits_soft_cap,
            scheduler_metadata=metadata.scheduler_metadata,
            num_splits=splits,
        )
        # The learned sinks of a layer are mass as M is, so the kernel is not given them.
        log_mass_HR = log_mass_of_rows(table_PH, metadata.query_start_loc, metadata.seq_lens, rows, self.sinks)
        out.copy_(self.remasked(out.transpose(0, 1), lse_HR[:, :rows].float(), log_mass_HR).transpose(0, 1))
        return output
