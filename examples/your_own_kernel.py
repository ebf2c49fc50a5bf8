"""You have an attention kernel of your own: add StableMask with remask(), then let check_attention() judge it.

python examples/your_own_kernel.py        needs hypothesis: pip install 'sm-flex[testing]'
"""

import torch
from torch import Tensor

from sm_flex import log_mass, remask
from sm_flex.testing import NotStableMask, check_attention


def my_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Stands for yours: ordinary causal attention that returns its output and its log-sum-exp."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    queries, keys = scores.shape[-2:]
    future = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(1 + keys - queries)
    scores = scores.masked_fill(future, float("-inf")).float()
    return (scores.softmax(-1).to(v.dtype)) @ v, scores.logsumexp(-1)


def attention(q, k, v, *, gamma, length, positions, visible, scale):
    """The signature that check_attention calls. What the kernel cannot do, it refuses."""
    if visible is not None:
        raise NotImplementedError("masks are not served")
    if q.shape[1] != k.shape[1]:
        raise NotImplementedError("grouped heads are not served")
    out, lse = my_kernel(q, k, v, scale)
    if positions is None:
        positions = torch.arange(q.shape[2], device=q.device)
    return remask(out, lse, log_mass(gamma, positions, length))


def forgot_the_training_length(q, k, v, *, gamma, length, positions, visible, scale):
    """A bug that is easy to write: the mass follows the length of the call."""
    return attention(q, k, v, gamma=gamma, length=k.shape[2], positions=positions, visible=visible, scale=scale)


report = check_attention(attention, max_examples=5)
print(report)
assert not report.failed

print()
try:
    check_attention(forgot_the_training_length, max_examples=5)
    raise SystemExit("the bug was not found")
except NotStableMask as error:
    print(error.report.headline)
    first = next(result for result in error.report.results if result.status == "failed")
    print(f"the smallest request found that breaks {first.law}:\n\n{first.code}")
