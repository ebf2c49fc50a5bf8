"""Packed documents: three texts in one row give what each gives alone, in three ways.

python examples/packed_documents.py
"""

import torch
from torch.nn.attention.flex_attention import create_block_mask

from sm_flex import flex_attention, headwise_gamma, scaled_dot_product_attention, stablemask, varlen_attn

torch.manual_seed(0)
heads, dim, training_length = 4, 16, 64
lengths = [5, 9, 7]
total, gamma = sum(lengths), headwise_gamma(heads)
q, k, v = (torch.randn(1, heads, total, dim) for _ in range(3))

# What we want: each document on its own.
alone = torch.cat(
    [
        scaled_dot_product_attention(*qkv, is_causal=True, score_mod=stablemask(gamma, length=training_length))
        for qkv in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    ],
    dim=2,
)

# 1. varlen_attn. It knows where documents start, so positions restart by themselves.
starts = torch.tensor([0, 5, 14, 21], dtype=torch.int32)
q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (q, k, v))  # (tokens, heads, dim)
mask = stablemask(gamma, length=training_length)
by_varlen = varlen_attn(q_THD, k_THD, v_THD, starts, starts, max(lengths), max(lengths), window_size=(-1, 0), score_mod=mask)

# 2. and 3. One mask says who sees whom, positions say how much mass each row carries. They are two things.
document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
positions = torch.cat([torch.arange(n) for n in lengths])
print("document ", document.tolist())
print("positions", positions.tolist())
mask = stablemask(gamma, length=training_length, positions=positions)
same_document = document.unsqueeze(1) == document
by_sdpa = scaled_dot_product_attention(q, k, v, attn_mask=same_document, score_mod=mask)

block_mask = create_block_mask(lambda b, h, i, j: (document[i] == document[j]) & (j <= i), None, None, total, total, device="cpu")
by_flex = flex_attention(q, k, v, score_mod=mask, block_mask=block_mask)

for name, out in (("varlen", by_varlen.transpose(0, 1)[None]), ("sdpa", by_sdpa), ("flex", by_flex)):
    print(f"{name:6} differs from the documents alone by {(out - alone).abs().max():.1e}")
    assert torch.allclose(out, alone, atol=1e-5)

# Positions that do not restart are another model: the mass of documents two and three would be too small.
no_restart = scaled_dot_product_attention(q, k, v, attn_mask=same_document, score_mod=stablemask(gamma, length=training_length))
print(f"without positions that restart: {(no_restart - alone).abs().max():.1e}")
assert (no_restart - alone).abs().max() > 1e-2
