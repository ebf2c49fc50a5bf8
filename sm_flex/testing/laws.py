"""The laws of StableMask, for anybody's attention: each a function law(fn, request) that raises AssertionError.

fn is as answer.py says. A law is stated on its own answers where it can be; how far two of them may be apart follows from
the budget of each (judge.py). l and l' are the log-sum-exp of the real scores and of the whole row, s = exp(l - l') the real
share of a row.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sm_flex.testing.answer import Answer, Attention, attend, needs_lse, same, solve
from sm_flex.testing.compare import check
from sm_flex.testing.judge import assert_within
from sm_flex.testing.request import FEATURES, Request

Check = Callable[[Attention, Request], None]
MASKLESS = ("grouped", "scale")


class Law(NamedTuple):
    """takes, needs: the FEATURES of a request that the law is stated for, and those that it is about."""

    check: Check
    takes: tuple[str, ...]
    needs: tuple[str, ...]
    gradient: bool
    finite_gamma: bool


LAWS: dict[str, Law] = {}


def law(
    takes: tuple[str, ...] = FEATURES, needs: tuple[str, ...] = (), gradient: bool = False, finite_gamma: bool = False
) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        LAWS[function.__name__] = Law(function, takes, needs, gradient, finite_gamma)
        return function

    return register


def right(fn: Attention, request: Request) -> None:
    truth = solve(request.arguments)
    assert_within(attend(fn, request).out, truth.out, truth.out_budget, "out")


@law(takes=())
def equation_11(fn: Attention, request: Request) -> None:
    """out = (softmax(A * C + P) * C) V, P = -j gamma right of the diagonal up to N, tau = -(p+1) gamma from N on (4.3)."""
    right(fn, request)


@law(takes=MASKLESS, needs=("grouped",))
def grouped_heads(fn: Attention, request: Request) -> None:
    """GQA is attention with repeated key heads: query head h has key head h // (H / Hkv), and a gamma of its own."""
    right(fn, request)
    k, v = (request.arguments[name].repeat_interleave(request.heads // request.kv_heads, dim=1) for name in "kv")
    same(attend(fn, request), attend(fn, request, k=k, v=v))


@law(takes=MASKLESS, needs=("positions",))
def positions(fn: Attention, request: Request) -> None:
    """Positions say what mass a row carries and nothing else: chunks of a cache, padding, rows beyond N (section 4.3)."""
    right(fn, request)


@law(needs=("visible",))
def masks(fn: Attention, request: Request) -> None:
    """A mask narrows the causal slots and leaves the mass alone; a row that sees nothing has out 0 and l' = log M."""
    right(fn, request)


@law(takes=(), needs=("scale",))
def scale(fn: Attention, request: Request) -> None:
    """The scale multiplies the real scores, and not the pseudo scores."""
    right(fn, request)


@law()
def log_sum_exp(fn: Attention, request: Request) -> None:
    """l' = logaddexp(l, log M), of the whole row of A_SM in eq. 8, -inf where there is neither key nor mass."""
    truth = solve(request.arguments)
    assert truth.lse is not None
    assert_within(needs_lse(attend(fn, request)), truth.lse, truth.lse_budget, "lse")


@law(takes=("grouped", "positions", "scale"))
def rows_sum_to_the_real_share(fn: Attention, request: Request) -> None:
    """With v = 1, out is s = sigmoid(l - log M) in [0, 1] (alpha in section 4.2), and s = exp(l - l')."""
    arguments = {**request.arguments, "v": torch.ones_like(request.arguments["v"])}
    truth, answer = solve(arguments), attend(fn, request, v=arguments["v"])
    assert_within(answer.out, truth.out, truth.out_budget, "share")
    assert answer.out.min() >= 0, "a share below 0"
    assert answer.out.max() <= 1 + truth.out_budget, "a share above 1"
    if answer.lse is not None:
        causal = solve({**arguments, "gamma": torch.full_like(arguments["gamma"], math.inf)}).lse
        assert causal is not None
        share = torch.exp(causal - answer.lse.double()).unsqueeze(-1).expand_as(answer.out)
        assert_within(share, answer.out.double(), answer.out_budget + 2 * answer.lse_budget.unsqueeze(-1), "exp(l - l')")


@law(takes=MASKLESS)
def identical_tokens_tell_their_position(fn: Attention, request: Request) -> None:
    """Section 4.2: for identical tokens alpha_i rises with the row up to N-1, where it is 1, as far as rounding shows it."""
    arguments = request.arguments
    q, k = (arguments[name][:, :, :1].expand_as(arguments[name]).contiguous() for name in "qk")
    changes = {"q": q, "k": k, "v": torch.ones_like(arguments["v"])}
    truth, answer = solve({**arguments, **changes}), attend(fn, request, **changes)
    within = slice(0, request.length)
    rise, true_rise = (x.out[:, :, within, 0].double().diff(dim=-1) for x in (answer, truth))
    assert (rise >= -2 * truth.out_budget).all(), "alpha falls"
    assert (rise[true_rise > 4 * truth.out_budget] > 0).all(), "alpha does not rise"


@law()
def no_row_sees_the_future(fn: Attention, request: Request) -> None:
    """A changed key and value leaves the rows before it bit-equal, and changes the rows from it on."""
    changed = request.cut % request.num_keys
    arguments = request.arguments
    k, v = arguments["k"].clone(), arguments["v"].clone()
    k[:, :, changed:] += 1.0
    v[:, :, changed:] += 3.0
    before, after = attend(fn, request), attend(fn, request, k=k, v=v)
    first = max(changed - (request.num_keys - request.num_queries), 0)  # the first query that sees slot `changed`
    assert torch.equal(before.out[:, :, :first], after.out[:, :, :first]), f"a row before {first} saw slot {changed}"
    if before.lse is not None and after.lse is not None:
        assert torch.equal(before.lse[..., :first], after.lse[..., :first]), f"lse of a row before {first} saw slot {changed}"
    difference = (solve({**arguments, "k": k, "v": v}).out - solve(arguments).out).abs().max()
    if difference > 2 * (before.out_budget + after.out_budget):
        assert not torch.equal(before.out, after.out), f"no row saw slot {changed}"


@law(takes=MASKLESS)
def a_prefix_has_a_prefix(fn: Attention, request: Request) -> None:
    """With N fixed a row depends on what is before it alone: not on the length of the call, nor of a cache."""
    end = 1 + request.cut % request.num_keys
    part = attend(fn, request, **{name: request.arguments[name][:, :, :end] for name in "qkv"})
    same(attend(fn, request), part, slice(0, end))


@law(takes=MASKLESS, needs=("positions",))
def cached_steps_are_the_full_pass(fn: Attention, request: Request) -> None:
    """Prefill, one decode step and a chunk, with positions, give the rows of one pass, below, at and beyond N (4.3)."""
    request = request.but(starts=None, num_queries=request.num_keys)
    q, k, v = (request.arguments[name] for name in "qkv")
    whole = attend(fn, request)
    middle = request.cut % request.num_keys
    for start, end in pairwise(sorted({0, middle, middle + 1, request.num_keys})):
        rows = torch.arange(start, end, device=request.device)
        step = attend(fn, request, q=q[:, :, start:end], k=k[:, :, :end], v=v[:, :, :end], positions=rows)
        same(whole, step, slice(start, end), f"rows {start}..{end - 1}")


@law(takes=MASKLESS, needs=("positions", "visible"))
def packed_is_one_by_one(fn: Attention, request: Request) -> None:
    """Documents laid one after another, positions restarting at 0, give what each gives alone."""
    request = request.but(starts=None, num_queries=request.num_keys, window=-1, hidden=0.0)
    packed = attend(fn, request)
    for start, end in pairwise((0, *request.documents, request.num_keys)):
        alone = {name: request.arguments[name][:, :, start:end] for name in "qkv"}
        same(packed, attend(fn, request, **alone, positions=None, visible=None), slice(start, end), f"document at {start}")


@law(takes=MASKLESS, needs=("positions", "visible"))
def padding_changes_nothing(fn: Attention, request: Request) -> None:
    """Slots of padding before a sequence, and unused ones after it, hidden by a mask; positions start at the first token."""
    pad, unused = request.cut % 4, request.cut // 4 % 4
    request = request.but(starts=None, documents=(), num_queries=request.num_keys, window=-1, hidden=0.0)
    rows = slice(pad, pad + request.num_keys)
    q, k, v = (torch.nn.functional.pad(request.arguments[name], (0, 0, pad, unused), value=3.0) for name in "qkv")
    slots = torch.arange(q.shape[2], device=request.device)
    visible = (slots <= slots.unsqueeze(1)) & (slots >= rows.start) & (slots < rows.stop)
    visible = visible.expand(request.batch, 1, -1, -1).contiguous()
    padded = attend(fn, request, q=q, k=k, v=v, visible=visible, positions=(slots - pad).clamp(min=0))
    same(padded, attend(fn, request), rows)


@law(takes=MASKLESS)
def infinite_gamma_is_causal_attention(fn: Attention, request: Request) -> None:
    """gamma = inf leaves no mass: PyTorch's own causal scaled_dot_product_attention, in float64."""
    answer = attend(fn, request.but(gamma=math.inf))
    q, k, v = (request.arguments[name].double() for name in "qkv")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    causal = sdpa(q, k, v, is_causal=True, scale=request.scale, enable_gqa=True)
    assert_within(answer.out, causal, answer.out_budget + 1e-10, "out")


@law()
def batch_and_heads_are_independent(fn: Attention, request: Request) -> None:
    """Permuting the batch, and whole groups of heads with their rates, permutes the answer."""
    arguments, device = request.arguments, request.device
    batch = torch.arange(request.batch, device=device).roll(1 + request.cut)
    groups = request.heads // request.kv_heads
    kv = torch.arange(request.kv_heads, device=device).roll(1 + request.cut)
    heads = (kv.unsqueeze(1) * groups + torch.arange(groups, device=device)).flatten()
    moved = {"q": arguments["q"][batch][:, heads], "k": arguments["k"][batch][:, kv], "v": arguments["v"][batch][:, kv]}
    moved["gamma"] = arguments["gamma"][heads]
    if request.positions is not None and request.positions.dim() == 2:
        moved["positions"] = request.positions[batch]
    if request.visible is not None:
        moved["visible"] = request.visible[batch]
    whole = attend(fn, request)
    there = None if whole.lse is None else whole.lse[batch][:, heads]
    same(
        attend(fn, request, **moved),
        Answer(whole.out[batch][:, heads], there, whole.out_budget, whole.lse_budget[batch][:, heads]),
    )


@law()
def linear_in_v(fn: Attention, request: Request) -> None:
    """out(a - 2b) = out(a) - 2 out(b), for a and b the values at even and at odd slots, which any dtype adds exactly."""
    v = request.arguments["v"]
    even = (torch.arange(request.num_keys, device=request.device) % 2 == 0).unsqueeze(-1)
    a, b = attend(fn, request, v=v * even), attend(fn, request, v=v * ~even)
    both = attend(fn, request, v=torch.where(even, v, -2 * v))
    budget = both.out_budget + a.out_budget + 2 * b.out_budget
    assert_within(both.out, a.out.double() - 2 * b.out.double(), budget, "out")


@law(gradient=True)
def gradients(fn: Attention, request: Request) -> None:
    """dq, dk and dv of eq. 11: dS = P' * (dP - rowsum(dout * out)), for P' = exp(score - l')."""
    _gradients(fn, request, learned_gamma=False)


@law(gradient=True, finite_gamma=True)
def gradient_of_gamma(fn: Attention, request: Request) -> None:
    """d gamma of eq. 11, for a gamma that requires grad: d log M = -(1 - s) * rowsum(dout * out)."""
    _gradients(fn, request, learned_gamma=True)


@law(gradient=True)
def gradient_of_lse(fn: Attention, request: Request) -> None:
    """A loss that reaches l' too: dS gains P' * dlse, or the backward raises; never dropped in silence."""
    needs_lse(attend(fn, request))
    _gradients(fn, request, learned_gamma=False, with_lse_grad=True)


def _gradients(fn: Attention, request: Request, **options: bool) -> None:
    arguments = request.arguments
    q, k, v, gamma, length = (arguments[name] for name in ("q", "k", "v", "gamma", "length"))
    kwargs = {name: arguments[name] for name in ("positions", "visible", "scale")}

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor | None]:
        answer = fn(q, k, v, gamma=gamma, length=length, **kwargs)
        return answer if isinstance(answer, tuple) else (answer, None)

    check(run, [q, k, v, gamma], lambda: {"length": length, **kwargs}, by_terms=True, **options)
