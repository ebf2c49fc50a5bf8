"""Decode with a key-value cache: cached steps give the rows of one full pass, if the training length is passed.

python examples/kv_cache.py
"""

from itertools import pairwise

import torch

from sm_flex import headwise_gamma, scaled_dot_product_attention, stablemask

torch.manual_seed(0)
heads, tokens, dim, training_length = 4, 24, 16, 20
gamma = headwise_gamma(heads)
q, k, v = (torch.randn(1, heads, tokens, dim) for _ in range(3))

# One full pass over all 24 tokens, the last four of them beyond the training length.
full = scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=stablemask(gamma, length=training_length))


def step(start: int, end: int, length: int) -> torch.Tensor:
    """Queries start..end-1 against a cache of `end` keys: a prefill, a chunk or a single decode step."""
    mask = stablemask(gamma, length=length, positions=torch.arange(start, end))
    # Several queries against a longer cache need a mask; stablemask narrows it to the causal slots.
    visible = torch.ones(end - start, end, dtype=torch.bool)
    return scaled_dot_product_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], attn_mask=visible, score_mod=mask)


# A prefill of ten tokens, a chunk of five, then one token at a time.
cuts = [0, 10, 15, *range(16, tokens + 1)]
cached = torch.cat([step(a, b, training_length) for a, b in pairwise(cuts)], dim=2)
error = (cached - full).abs().amax(dim=(0, 1, 3))
print(f"cached against full pass, N = {training_length} fixed: largest difference {error.max():.1e}")
assert error.max() < 1e-5

# The mistake to avoid: let the mass follow the cache. Each row is then computed with another N.
growing = torch.cat([step(a, b, b) for a, b in pairwise(cuts)], dim=2)
wrong = (growing - full).abs().amax(dim=(0, 1, 3))
print(f"cached against full pass, N = length of the cache:  largest difference {wrong.max():.1e}")
assert wrong.max() > 1e-3
print("Always pass length: the training length, the same in every call.")
