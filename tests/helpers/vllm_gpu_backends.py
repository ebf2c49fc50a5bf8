"""The two GPU backends on a CPU: what only a GPU can run of them, written out in plain PyTorch.

That is the write to the paged cache, and FlashAttention's kernel. Everything else is the backend's own code.
"""

from typing import Any

import torch
from torch import Tensor

from sm_flex_vllm.flash import StableMaskFlashBackend, StableMaskFlashImpl
from sm_flex_vllm.flex import StableMaskFlexBackend, StableMaskFlexImpl


def write_to_cache(self: Any, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
    kept = slot_mapping >= 0
    slots, size = slot_mapping[kept].long(), keys.shape[1]
    keys[slots // size, slots % size] = key[: len(kept)][kept]
    values[slots // size, slots % size] = value[: len(kept)][kept]


class FlexOnCPU(StableMaskFlexBackend):
    serves_stablemask = True

    @staticmethod
    def get_impl_cls() -> Any:
        return FlexOnCPUImpl


class FlexOnCPUImpl(StableMaskFlexImpl):
    do_kv_cache_update = write_to_cache


class FlashOnCPU(StableMaskFlashBackend):
    serves_stablemask = True
    supported_dtypes = (torch.float32, torch.bfloat16, torch.float16)

    @staticmethod
    def get_impl_cls() -> Any:
        return FlashOnCPUImpl


class FlashOnCPUImpl(StableMaskFlashImpl):
    do_kv_cache_update = write_to_cache

    def attend(self, **call: Any) -> Tensor:
        """What flash_attn_varlen_func does with a paged cache; its log-sum-exp, (H, R)."""
        assert call["causal"] is True
        q, out, keys, values = call["q"], call["out"], call["k"], call["v"]
        lse = torch.empty(q.shape[1], q.shape[0])
        starts = call["cu_seqlens_q"].tolist()
        left, right = call["window_size"]
        assert right in (0, -1)
        for i, length in enumerate(call["seqused_k"].tolist()):
            a, b = starts[i], starts[i + 1]
            pages = call["block_table"][i, : -(-length // keys.shape[1])].long()
            group = q.shape[1] // keys.shape[2]
            k, v = (x[pages].flatten(0, 1)[:length].repeat_interleave(group, 1).float() for x in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", q[a:b].float(), k) * call["softmax_scale"]
            if call["softcap"]:
                scores = torch.tanh(scores / call["softcap"]) * call["softcap"]
            ages = torch.arange(length - (b - a), length)[:, None] - torch.arange(length)
            seen = (ages >= 0) & ((ages <= left) if left >= 0 else True)
            scores = scores.masked_fill(~seen, -torch.inf)
            lse[:, a:b] = scores.logsumexp(-1)
            out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(out.dtype)
        return lse
