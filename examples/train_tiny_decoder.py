"""Train a tiny RoPE decoder to output the position of each token when all tokens are equal.

    python examples/train_tiny_decoder.py      about ten seconds on one core

Relative position encodings cannot solve it: with equal tokens every row of plain causal attention gives the same output
(section 3 of the paper). The real share of a StableMask row says where the row is.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sm_flex import StableMask, headwise_gamma, scaled_dot_product_attention, stablemask

LENGTH, WIDTH, HEADS, STEPS = 32, 64, 4, 200


def rope(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[2]).unsqueeze(1) * 10000.0 ** -torch.linspace(0, 1, x.shape[-1] // 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: StableMask | None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True, score_mod=mask)  # None: torch's own
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def train(mask: StableMask | None) -> float:
    """Accuracy after training; the seed is the same, so the two runs differ in the mask alone."""
    torch.manual_seed(0)
    blocks, embedding, head = nn.ModuleList([Block(), Block()]), nn.Embedding(16, WIDTH), nn.Linear(WIDTH, LENGTH)
    parameters = [*blocks.parameters(), *embedding.parameters(), *head.parameters()]
    optimizer, target = torch.optim.AdamW(parameters, lr=1e-3), torch.arange(LENGTH).expand(16, LENGTH)
    logits = torch.empty(0)
    for _ in range(STEPS):
        x = embedding(torch.randint(16, (16, 1)).expand(16, LENGTH))  # one token, repeated
        for block in blocks:
            x = block(x, mask)
        logits = head(x)
        optimizer.zero_grad()
        cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
        optimizer.step()
    return (logits.argmax(-1) == target).float().mean().item()


causal, stable = train(None), train(stablemask(headwise_gamma(HEADS), length=LENGTH))
print(f"right positions of {LENGTH}: plain causal {causal:.0%} (chance {1 / LENGTH:.0%}), StableMask {stable:.0%}")
assert causal < 0.1
assert stable > 0.9
