"""StableMask on vLLM's CPU backend: its own kernel and its own cache, called by the cut of cpu_batch.py.

Whatever the kernel serves is served: chunks, prefix caching, windows, soft capping, an fp8 cache, any instruction set.
"""

# pyright: reportMissingImports=false

from typing import Any, cast

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from sm_flex_vllm import cpu_batch, tables
from sm_flex_vllm.cpu_batch import Tile
from sm_flex_vllm.layer import StableMaskLayer, served

NO_SINK = -1e30  # adds nothing, and its difference to another is a number


class StableMaskCPUBackend(CPUAttentionBackend):
    serves_stablemask = True

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return StableMaskCPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return StableMaskCPUBuilder


class StableMaskCPUBuilder(CPUAttentionMetadataBuilder):
    """vLLM's own metadata, and beside it the cut of the step, where some layer of the group is served."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
        found = [layer for layer in layers.values() if served(layer)]
        self.serves = bool(found)
        for layer in found:  # now, not at the first request
            cast(Any, layer.impl).table(layer, self.device)

    def build(self, *args: Any, **kwargs: Any) -> CPUAttentionMetadata:
        metadata = super().build(*args, **kwargs)
        if self.serves:
            cast(Any, metadata).step = Step(self, metadata)
        return metadata


class Step:
    """One step's cut and what the kernel wants for each part of it, shared by the layers."""

    def __init__(self, builder: StableMaskCPUBuilder, metadata: CPUAttentionMetadata) -> None:
        if metadata.dynamic_causal is not None or metadata.causal is not True:
            raise NotImplementedError("StableMask is causal, and vLLM asks for attention that is not")
        self._builder, self._block_table = builder, metadata.block_table
        starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        rows, runs = cpu_batch.cut(starts, lengths)
        self.runs = [(run, cpu_batch.tiles(run)) for run in runs]
        self._calls: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._masses: dict[tuple[int, Any], Tensor] = {}
        # Each row of its own, with the kernel's arguments that say where it is.
        self.rows = [(row, self.tile_call(Tile(0, 1, i, [0, 1], [p + 1]), builder.num_kv_heads)) for row, i, p in rows]
        self.row_positions = torch.tensor([position for _, _, position in rows], dtype=torch.int64)

    def tile_call(self, tile: Tile, num_kv_heads: int) -> dict[str, Any]:
        """The kernel's arguments that say where a tile or run is, for so many kv heads and their query heads."""
        group = self._builder.num_heads // self._builder.num_kv_heads
        return self._call(tile, num_kv_heads * group, num_kv_heads)

    def masses(self, table: Tensor, tile: Tile) -> Tensor:
        """log M of a tile's rows, (R, H)."""
        key = (id(table), tile[:3])
        if key not in self._masses:
            self._masses[key] = table[cpu_batch.row_positions(tile)]
        return self._masses[key]

    def _call(self, tile: Tile, num_heads: int, num_kv_heads: int) -> dict[str, Any]:
        key = (tile[:3], tile.ends[-1], num_heads)
        if key not in self._calls:
            builder = self._builder
            lengths = torch.tensor(tile.ends, dtype=torch.int32)
            starts = torch.tensor(tile.starts, dtype=torch.int32)
            schedule = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(tile.ends),
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=builder.head_dim,
                seq_lens=lengths,
                dtype=builder.dtype,
                query_start_loc=starts,
                causal=True,
                sliding_window_size=builder.window_size,
                isa=builder.isa,
                enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
                kv_cache_dtype=builder.kv_cache_dtype,
            )
            table = self._block_table[tile.request : tile.request + len(tile.ends)]
            self._calls[key] = {
                "query_start_loc": starts,
                "seq_lens": lengths,
                "block_table": table,
                "scheduler_metadata": schedule,
            }
        return self._calls[key]


class StableMaskCPUImpl(StableMaskLayer, CPUAttentionBackendImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.read_settings("CPU_ATTN", self.attn_type, self.alibi_slopes, serves_values=False)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if self.stablemask is None or attn_metadata is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )  # fmt: skip
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization is not supported by vLLM's CPU backend")
        step, table = cast(Any, attn_metadata).step, self.table(layer, query.device)
        blocks, kv_heads, block_size, _ = kv_cache.shape
        caches = kv_cache.view(blocks, kv_heads, block_size * 2, -1).chunk(2, dim=2)
        for run, tiles in step.runs:
            here = slice(run.first, run.last)
            self._attend(layer, query[here], output[here], caches, step.tile_call(run, kv_heads), None)
            # Soft capping changes each score by itself, so that a mean of keys says nothing of it.
            short = self.sliding_window == -1 or run.last - run.first <= self.sliding_window
            keys = None if key is None or not self._own_keys_are_seen() else key
            earlier, request = None, -1
            for tile in tiles:
                # The end of one request and others behind it may be one tile: they do not see its keys.
                earlier = earlier if tile.request == request and len(tile.ends) == 1 else None
                self._bring_in_the_mass(layer, query, keys, earlier, output, caches, step, table, tile)
                if keys is not None and short and not self.logits_soft_cap:
                    earlier, request = cpu_batch.with_these(earlier, keys[tile.first : tile.last]), tile.request
        if step.rows:
            masses = tables.add_sinks(table[step.row_positions], self.sinks).unbind()
            for (row, where), mass in zip(step.rows, masses, strict=True):
                self._attend(layer, query[row : row + 1], output[row : row + 1], caches, where, mass)
        return output

    def _own_keys_are_seen(self) -> bool:
        """Whether the keys of this step are what its rows see of themselves: not another layer's, nor rounded by the cache."""
        return self.kv_sharing_target_layer_name is None and not self.is_fp8_kv_cache

    def _bring_in_the_mass(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        earlier: cpu_batch.Earlier | None,
        output: Tensor,
        caches: Any,
        step: Step,
        table: Tensor,
        tile: Tile,
    ) -> None:
        """Scales the causal output of a tile's rows by s, where that changes it."""
        here, group = slice(tile.first, tile.last), self.num_queries_per_kv
        masses = tables.add_sinks(step.masses(table, tile), self.sinks)
        lse = None
        if key is not None:
            lse = cpu_batch.least_lse(query[here], key[here], self.scale, earlier)
            lse = cpu_batch.soft_capped(lse, self.logits_soft_cap) if self.logits_soft_cap else lse
        needed = cpu_batch.kv_heads_of(cpu_batch.heads_that_need_it(masses, lse, query.dtype), group)
        if needed is None:
            return
        first, last = needed
        heads = slice(first * group, last * group)
        masses, causal = masses[:, heads], output[here, heads]
        sinks = masses.amax(0).clamp(min=NO_SINK)
        with_sinks = torch.empty_like(causal, memory_format=torch.contiguous_format)
        caches = [cache[:, first:last] for cache in caches]
        self._attend(layer, query[here, heads], with_sinks, caches, step.tile_call(tile, last - first), sinks)
        causal *= cpu_batch.real_share(causal, with_sinks, masses, sinks).unsqueeze(-1).to(causal.dtype)

    def _attend(
        self, layer: Any, query: Tensor, output: Tensor, caches: Any, where: dict[str, Any], sinks: Tensor | None
    ) -> None:
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=caches[0],
            value_cache=caches[1],
            output=output,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=self.sliding_window,
            softcap=self.logits_soft_cap,
            s_aux=sinks,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
            **where,
        )
