"""Is what benchmarks.speed times StableMask? Slices of each variant's output and gradients against eq. 11.

The first and the last rows of the first and the last key head, where eq. 11 needs few queries: the first ROWS
rows see only one another, and of the last ROWS keys only the last ROWS queries know, so their dk and dv are
whole as well.
"""

import torch
from torch import Tensor

from benchmarks.speed.cases import WINDOW
from benchmarks.speed.timing import Inputs
from benchmarks.speed.variants import Setup, Variant
from sm_flex.testing import oracle

ROWS = 48
# Of the largest value; what bf16 scores, softmax and gradients differ by in the dense formula is half of this.
TOLERANCE = {"bf16": 0.04, "fp32": 1e-3}


def error_of(variant: Variant, at: Setup, inputs: Inputs) -> float:
    """The largest difference from eq. 11 in float64 in out, dq, dk, dv, over the largest value of its slice.

    Of a variant without gradients, in out alone.

    Raises ValueError beyond TOLERANCE: a wrong kernel's time is worth nothing.
    """
    q, k, v, grad = inputs
    with torch.set_grad_enabled(variant.backward):
        out = variant.call(*(x if variant.backward else x.detach() for x in (q, k, v)))
    dq, *dkv = torch.autograd.grad(out, (q, k, v), grad) if variant.backward else (None,)
    group = at.case.heads // at.case.kv_heads
    worst = 0.0
    for kv_head in {0, at.case.kv_heads - 1}:
        heads = slice(kv_head * group, (kv_head + 1) * group)
        kv = slice(kv_head, kv_head + 1)
        gamma = at.gammas[variant.gamma][heads].double()
        for first in (True, False):
            # In the last document; documents are as long as the call where nothing is packed.
            begin, end = q.shape[2] - at.lengths[-1], q.shape[2]
            rows = slice(begin, min(end, begin + ROWS)) if first else slice(max(begin, end - ROWS), end)
            keys = slice(begin, rows.stop)
            wanted = _reference(q, k, v, grad, at, gamma, heads, kv, rows, keys)
            found = [out[-1:, heads, rows]] + ([] if dq is None else [dq[-1:, heads, rows]])
            if not first:
                found += [x[-1:, kv, rows] for x in dkv]
            for name, ours, exact in zip(("out", "dq", "dk", "dv"), found, wanted, strict=False):
                exact = exact[:, :, -ours.shape[2] :]
                error = float((ours.detach().double() - exact).abs().max() / exact.abs().max())
                if not error <= TOLERANCE[at.case.dtype]:
                    where = "first" if first else "last"
                    raise ValueError(f"wrong: {name} of the {where} rows is {error:.2e} of its largest value off eq. 11")
                worst = max(worst, error)
    return worst


def _reference(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, at: Setup, gamma: Tensor,
    heads: slice, kv: slice, rows: slice, keys: slice,
) -> tuple[Tensor, ...]:  # fmt: skip
    exact = [x.detach().double().requires_grad_() for x in (q[-1:, heads, rows], k[-1:, kv, keys], v[-1:, kv, keys])]
    positions = torch.arange(rows.start - keys.start, rows.stop - keys.start, device=q.device)
    distance = positions.unsqueeze(1) - torch.arange(keys.stop - keys.start, device=q.device)
    visible = distance < WINDOW if at.case.kind == "window" else None
    bias = None
    if at.case.kind == "alibi":
        bias = -at.gammas["headwise"][heads].double().reshape(1, -1, 1, 1) * distance
    repeated = [exact[0], *(x.repeat_interleave(heads.stop - heads.start, 1) for x in exact[1:])]
    out, _ = oracle(*repeated, gamma=gamma, length=at.length, positions=positions, visible=visible, bias=bias)
    return out.detach(), *torch.autograd.grad(out, exact, grad[-1:, heads, rows].double())
