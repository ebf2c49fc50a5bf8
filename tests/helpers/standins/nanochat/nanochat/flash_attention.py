from types import SimpleNamespace

import torch
from torch.nn import functional as F


def _softmax_attention(q, k, v, first, window):
    """Queries at first, first + 1, ... of the keys 0, 1, ..."""
    row = first + torch.arange(q.shape[1])[:, None]
    column = torch.arange(k.shape[1])
    seen = column <= row
    if window >= 0:
        seen &= column >= row - window
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1)):
    return _softmax_attention(q, k, v, 0, window_size[0])


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, causal=False, window_size=(-1, -1)
):  # fmt: skip
    assert cache_seqlens is not None
    first = int(cache_seqlens[0])
    end = first + q.shape[1]
    k_cache[:, first:end], v_cache[:, first:end] = k, v
    return _softmax_attention(q, k_cache[:, :end], v_cache[:, :end], first, window_size[0])


flash_attn = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)
