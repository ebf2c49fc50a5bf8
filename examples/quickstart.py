"""StableMask in three calls: one for each attention function of PyTorch, and all three agree.

python examples/quickstart.py
"""

import torch

import sm_flex
from sm_flex import headwise_gamma, stablemask

torch.manual_seed(0)
batch, heads, kv_heads, length, dim = 2, 8, 2, 128, 64
q = torch.randn(batch, heads, length, dim, requires_grad=True)
k = torch.randn(batch, kv_heads, length, dim, requires_grad=True)
v = torch.randn(batch, kv_heads, length, dim, requires_grad=True)

# gamma says how fast the pseudo scores decay; head-wise gives every head its own. length is N, the training length.
gamma = headwise_gamma(heads)
mask = stablemask(gamma, length=2048)
print("gamma per head:", ", ".join(f"{x:.4f}" for x in gamma.tolist()))

# 1. flex_attention: the general one.
flex = sm_flex.flex_attention(q, k, v, score_mod=mask, enable_gqa=True)

# 2. scaled_dot_product_attention: what most models call.
sdpa = sm_flex.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, score_mod=mask)

# 3. varlen_attn: packed documents, (tokens, heads, dim). Here each sequence of the batch is one document.
packed_q, packed_k, packed_v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
starts = torch.tensor([0, length, 2 * length], dtype=torch.int32)
packed = sm_flex.varlen_attn(
    packed_q, packed_k, packed_v, starts, starts, length, length,
    window_size=(-1, 0), enable_gqa=True, score_mod=mask,
)  # fmt: skip
varlen = packed.unflatten(0, (batch, length)).transpose(1, 2)

print(f"flex and sdpa differ by   {(flex - sdpa).abs().max():.1e}")
print(f"flex and varlen differ by {(flex - varlen).abs().max():.1e}")
assert torch.allclose(flex, sdpa, atol=1e-5)
assert torch.allclose(flex, varlen, atol=1e-5)

# It trains: gradients reach q, k and v, by the backward of PyTorch's own kernel.
flex.sum().backward()
assert q.grad is not None
print(f"gradient of q: shape {tuple(q.grad.shape)}, largest entry {q.grad.abs().max():.3f}")

# Without a StableMask each function is torch's own.
plain = sm_flex.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
assert torch.equal(plain, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
print(f"plain causal attention differs from StableMask by up to {(plain - flex).abs().max():.2f}")
