"""A learned gamma and learned attention sinks: two parameters per head that train like any other.

python examples/learned_gamma_and_sinks.py
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from sm_flex import scaled_dot_product_attention, stablemask

torch.manual_seed(0)
batch, heads, tokens, dim, length = 8, 4, 32, 8, 32


class Attention(nn.Module):
    """Attention with a gamma and a sink per head; the StableMask is made anew in each forward."""

    def __init__(self, with_gamma: bool, with_sink: bool) -> None:
        super().__init__()
        # softplus keeps gamma above 0, whatever the optimizer does to the parameter.
        self.raw_gamma = nn.Parameter(torch.zeros(heads)) if with_gamma else None
        self.sink = nn.Parameter(torch.zeros(heads)) if with_sink else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gamma = math.inf if self.raw_gamma is None else softplus(self.raw_gamma)  # inf: no mass of its own
        mask = stablemask(gamma, length=length, sink=self.sink)
        return scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=mask)


# A teacher with gammas and sinks of its own; a student with the same inputs learns them from the teacher's outputs.
q, k, v = (torch.randn(batch, heads, tokens, dim) for _ in range(3))
teacher_gamma = torch.tensor([1.5, 0.4, 0.1, 0.03])
teacher_sink = torch.tensor([-1.0, 0.0, 1.0, 2.0])

for title, with_gamma, with_sink in (("gamma", True, False), ("sink (gpt-oss)", False, True), ("both", True, True)):
    mask = stablemask(teacher_gamma if with_gamma else math.inf, length=length, sink=teacher_sink if with_sink else None)
    target = scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=mask)
    student = Attention(with_gamma, with_sink)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    loss = torch.tensor(torch.inf)
    for _ in range(500):
        optimizer.zero_grad()
        loss = (student(q, k, v) - target).square().mean()
        loss.backward()
        optimizer.step()
    print(f"{title}: loss {loss.item():.1e}")
    if student.raw_gamma is not None:
        print("  gamma, learned:", [round(x, 2) for x in softplus(student.raw_gamma).tolist()])
        assert torch.allclose(softplus(student.raw_gamma), teacher_gamma, atol=0.05)
    if student.sink is not None:
        print("  sink,  learned:", [round(x, 2) for x in student.sink.tolist()])
        assert torch.allclose(student.sink, teacher_sink, atol=0.1)
