"""FlashAttention 2's functions on PyTorch's engines, CPUs included, and with a StableMask.

    import sm_flex.flash_attn as flash_attn  # where it was: import flash_attn

    out = flash_attn.flash_attn_func(q, k, v, causal=True)
    out = flash_attn.flash_attn_func(q, k, v, causal=True, score_mod=stablemask(gamma, length=N))

Names, order of arguments and defaults are those of flash-attn 2.8. Added are score_mod, and FlashAttention 4's
learnable_sink. What these functions do not do is refused by name.

Shapes in names: B batch, S queries, T keys, H query heads, D head dim. FlashAttention's tensors are (B, S, H, D),
and (T, H, D) for packed documents; k and v may have fewer heads.
"""

from sm_flex.flash_attn.batched import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from sm_flex.flash_attn.kvcache import flash_attn_with_kvcache
from sm_flex.flash_attn.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
