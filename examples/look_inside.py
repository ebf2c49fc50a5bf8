"""Look inside a call: the attention matrix, what goes to the first token, and the share of a row that is real.

python examples/look_inside.py
"""

import torch

from sm_flex import headwise_gamma, stablemask
from sm_flex.diagnostics import attention_map, first_token_share, real_share

torch.manual_seed(0)
heads, tokens, dim = 4, 8, 16
q, k = (torch.randn(1, heads, tokens, dim) for _ in range(2))
gamma = headwise_gamma(heads)
mask = stablemask(gamma, length=tokens)


def show(name: str, rows: torch.Tensor) -> None:
    print(f"\n{name}")
    for row in rows:
        print("  " + " ".join(f"{x:4.2f}" if x else "   ." for x in row.tolist()))


# The matrix of eq. 11 for head 0 (gamma = 0.25): lower triangle only, rows that sum to less than 1.
weights = attention_map(q, k, mask)
show("attention of head 0, StableMask", weights[0, 0])
show("attention of head 0, plain causal", attention_map(q, k, None)[0, 0])

# The row sums are the real share, alpha in the paper. The rest of the row went to the pseudo scores.
share = real_share(q, k, mask)
show("real share of each row, per head", share[0])
assert torch.allclose(weights.sum(-1), share, atol=1e-6)
assert torch.allclose(share[..., -1], torch.ones(heads))  # the last row before N is plain causal

# What a row pays to the first token: the complaint that StableMask starts from.
causal, stable = first_token_share(q, k, None), first_token_share(q, k, mask)
show("attention to the first token, plain causal", causal[0])
show("attention to the first token, StableMask", stable[0])
assert (stable <= causal + 1e-6).all()
assert torch.allclose(stable, causal * share, atol=1e-6)  # each row is causal attention times its real share

# With identical tokens a plain causal row cannot know where it is; the real share can.
same = torch.ones(1, heads, tokens, dim) / dim**0.5
share = real_share(same, same, mask)
show("real share of identical tokens: it rises with the position", share[0])
assert (share.diff(dim=-1) > 0).all()
