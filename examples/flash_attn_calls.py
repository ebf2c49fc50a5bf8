"""Code that calls flash-attn, on a CPU and with StableMask: one import changes. Training, documents, decoding with a cache.

python examples/flash_attn_calls.py
"""

import torch

import sm_flex.flash_attn as flash_attn  # where it was: import flash_attn
from sm_flex import headwise_gamma, stablemask

torch.manual_seed(0)
batch, tokens, heads, kv_heads, dim = 2, 24, 4, 2, 16
q = torch.randn(batch, tokens, heads, dim, requires_grad=True)  # flash-attn's layout
k, v = (torch.randn(batch, tokens, kv_heads, dim, requires_grad=True) for _ in range(2))

# flash-attn's own attention, with a sliding window; then StableMask by one more keyword. Both train.
plain = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(8, 0))
options = {"causal": True, "score_mod": stablemask(headwise_gamma(heads), length=64)}
full = flash_attn.flash_attn_func(q, k, v, **options)
(plain.square().mean() + full.square().mean()).backward()
print(f"norms of the gradients: q {q.grad.norm():.3f}, k {k.grad.norm():.3f}, v {v.grad.norm():.3f}")

# The two sequences packed one after the other.
cu = torch.arange(batch + 1, dtype=torch.int32) * tokens
packed = flash_attn.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), cu, cu, tokens, tokens, **options)
error = (packed.unflatten(0, (batch, tokens)) - full).abs().max()
print(f"packed documents against the batch: largest difference {error:.1e}")
assert error < 1e-5

# A prompt of 16 tokens and eight decode steps. k and v are written into the caches.
k_cache, v_cache = (torch.zeros(batch, 32, kv_heads, dim) for _ in range(2))
parts, start = [], 0
with torch.no_grad():
    for size in (16, *[1] * 8):
        new = slice(start, start + size)
        parts.append(
            flash_attn.flash_attn_with_kvcache(q[:, new], k_cache, v_cache, k[:, new], v[:, new], cache_seqlens=start, **options)
        )
        start += size
error = (torch.cat(parts, dim=1) - full).abs().max()
print(f"prompt and decode steps against the full pass: largest difference {error:.1e}")
assert error < 1e-5
assert torch.equal(k_cache[:, :tokens], k)
