"""The laws of StableMask, for anybody's attention: each a function law(fn, problem) that raises AssertionError.

fn is called as contract.py says. A law compares fn's outputs with one another where it can; how far two of them may be apart
follows from the budget of each (tolerance.py). l and l' are the log-sum-exp of the real scores and of the whole row,
s = exp(l - l') the real share of a row.
"""

import math
from itertools import pairwise

import torch

from sm_flex.testing.contract import Attention, Output, assert_agree, assert_gradients, attend, reference, require_lse
from sm_flex.testing.law import BASIC, NO_SINK, NO_VALUE, WITHOUT_VALUE, assert_one_more_key, assert_right, law
from sm_flex.testing.law import LAWS as LAWS
from sm_flex.testing.problem import Problem
from sm_flex.testing.tolerance import assert_within


@law(takes=())
def equation_11(fn: Attention, problem: Problem) -> None:
    """out = (softmax(A * C + P) * C) V, P = -j gamma right of the diagonal up to N, tau = -(p+1) gamma from N on (4.3)."""
    assert_right(fn, problem)


@law(takes=BASIC, needs=("grouped",))
def grouped_heads(fn: Attention, problem: Problem) -> None:
    """GQA is attention with repeated key heads: query head h has key head h // (H / Hkv), and a gamma of its own."""
    assert_right(fn, problem)
    arguments, groups = problem.arguments, problem.heads // problem.kv_heads
    repeated = {name: arguments[name].repeat_interleave(groups, dim=1) for name in "kv"}
    if problem.sink_values == problem.kv_heads and "sink_value" in arguments:
        repeated["sink_value"] = arguments["sink_value"].repeat_interleave(groups, dim=0)
    assert_agree(attend(fn, problem), attend(fn, problem, **repeated))


@law(takes=BASIC, needs=("positions",))
def positions(fn: Attention, problem: Problem) -> None:
    """Positions say what mass a row carries and nothing else: chunks of a cache, padding, rows beyond N (section 4.3)."""
    assert_right(fn, problem)


@law(needs=("visible",))
def masks(fn: Attention, problem: Problem) -> None:
    """A mask narrows the causal slots and leaves the mass alone; a row that sees nothing has out 0 and l' = log M.

    Where a sink has a value, out is p_sink * v there.
    """
    assert_right(fn, problem)


@law(takes=(), needs=("scale",))
def scale(fn: Attention, problem: Problem) -> None:
    """The scale multiplies the real scores, and not the pseudo scores."""
    assert_right(fn, problem)


@law(takes=BASIC, needs=("sink",))
def sink(fn: Attention, problem: Problem) -> None:
    """A sink is one more pseudo column in every row: log M becomes logaddexp(log M, sink). A sink of -inf is none."""
    assert_right(fn, problem)
    none = {"sink": torch.full_like(problem.arguments["sink"], -math.inf)}
    assert_agree(attend(fn, problem, **none), attend(fn, problem.replace(sink=None)))


@law(takes=BASIC, needs=("sink_value",))
def sink_value(fn: Attention, problem: Problem) -> None:
    """What a sink carries joins out with the sink's own share, p_sink = exp(sink - l'). A value of 0 is none."""
    assert_right(fn, problem)
    none = {"sink_value": torch.zeros_like(problem.arguments["sink_value"])}
    assert_agree(attend(fn, problem, **none), attend(fn, problem.replace(sink_values=0)))


@law(takes=WITHOUT_VALUE, needs=("sink",))
def a_sink_is_a_key_without_value(fn: Attention, problem: Problem) -> None:
    """With gamma = inf a sink is one more key of that score, whose value is 0: ordinary attention to it, in float64."""
    assert_one_more_key(fn, problem)


@law(needs=("sink_value",))
def a_sink_with_a_value_is_a_key(fn: Attention, problem: Problem) -> None:
    """With gamma = inf a sink is one more key of that score and that value: ordinary attention to it, in float64."""
    assert_one_more_key(fn, problem)


@law(needs=("sink",))
def a_constant_moves_lse_alone(fn: Attention, problem: Problem) -> None:
    """With gamma = inf a constant added to every score and to the sink leaves out as it is, and moves lse by it."""
    problem = problem.replace(gamma=math.inf)
    q, k, sink = (problem.arguments[name].clone() for name in ("q", "k", "sink"))
    step = (255 / 64, -255 / 64)[problem.cut % 2]  # in every dtype, and its sum with a sink not in bf16
    q[..., 0], k[..., 0] = 1.0, 0.0
    before = attend(fn, problem, q=q, k=k)
    k[..., 0] = step
    constant = step * (q.shape[-1] ** -0.5 if problem.scale is None else problem.scale)
    moved = None if before.lse is None else before.lse.double() + constant
    assert_agree(attend(fn, problem, q=q, k=k, sink=sink + constant), before._replace(lse=moved))


@law()
def log_sum_exp(fn: Attention, problem: Problem) -> None:
    """l' = logaddexp(l, log M), of the whole row of A_SM in eq. 8, -inf where there is neither key nor mass."""
    expected = reference(problem.arguments)
    assert expected.lse is not None
    assert_within(require_lse(attend(fn, problem)), expected.lse, expected.lse_budget, "lse")


@law(takes=(*NO_VALUE, "positions"))
def rows_sum_to_the_real_share(fn: Attention, problem: Problem) -> None:
    """With v = 1, out is s = sigmoid(l - log M) in [0, 1] (alpha in section 4.2), and s = exp(l - l')."""
    arguments = {**problem.arguments, "v": torch.ones_like(problem.arguments["v"])}
    expected, output = reference(arguments), attend(fn, problem, v=arguments["v"])
    assert_within(output.out, expected.out, expected.out_budget, "share")
    assert output.out.min() >= 0, "a share below 0"
    assert output.out.max() <= 1 + expected.out_budget, "a share above 1"
    if output.lse is not None:
        causal = reference({**arguments, "gamma": torch.full_like(arguments["gamma"], math.inf), "sink": None}).lse
        assert causal is not None
        share = torch.exp(causal - output.lse.double()).unsqueeze(-1).expand_as(output.out)
        assert_within(share, output.out.double(), output.out_budget + 2 * output.lse_budget.unsqueeze(-1), "exp(l - l')")


@law(takes=NO_SINK)
def identical_tokens_tell_their_position(fn: Attention, problem: Problem) -> None:
    """Section 4.2: for identical tokens alpha_i rises with the row up to N-1, where it is 1, as far as rounding shows it."""
    arguments = problem.arguments
    q, k = (arguments[name][:, :, :1].expand_as(arguments[name]).contiguous() for name in "qk")
    changes = {"q": q, "k": k, "v": torch.ones_like(arguments["v"])}
    expected, output = reference({**arguments, **changes}), attend(fn, problem, **changes)
    within = slice(0, problem.length)
    rise, expected_rise = (x.out[:, :, within, 0].double().diff(dim=-1) for x in (output, expected))
    assert (rise >= -2 * expected.out_budget).all(), "alpha falls"
    assert (rise[expected_rise > 4 * expected.out_budget] > 0).all(), "alpha does not rise"


@law()
def no_row_sees_the_future(fn: Attention, problem: Problem) -> None:
    """A changed key and value leaves the rows before it bit-equal, and changes the rows from it on."""
    changed = problem.cut % problem.num_keys
    arguments = problem.arguments
    k, v = arguments["k"].clone(), arguments["v"].clone()
    k[:, :, changed:] += 1.0
    v[:, :, changed:] += 3.0
    before, after = attend(fn, problem), attend(fn, problem, k=k, v=v)
    first = max(changed - (problem.num_keys - problem.num_queries), 0)  # the first query that sees slot `changed`
    assert torch.equal(before.out[:, :, :first], after.out[:, :, :first]), f"a row before {first} saw slot {changed}"
    if before.lse is not None and after.lse is not None:
        assert torch.equal(before.lse[..., :first], after.lse[..., :first]), f"lse of a row before {first} saw slot {changed}"
    difference = (reference({**arguments, "k": k, "v": v}).out - reference(arguments).out).abs().max()
    if difference > 2 * (before.out_budget + after.out_budget):
        assert not torch.equal(before.out, after.out), f"no row saw slot {changed}"


@law(takes=BASIC)
def a_prefix_has_a_prefix(fn: Attention, problem: Problem) -> None:
    """With N fixed a row depends on what is before it alone: not on the length of the call, nor of a cache."""
    end = 1 + problem.cut % problem.num_keys
    part = attend(fn, problem, **{name: problem.arguments[name][:, :, :end] for name in "qkv"})
    assert_agree(attend(fn, problem), part, slice(0, end))


@law(takes=BASIC, needs=("positions",))
def cached_steps_are_the_full_pass(fn: Attention, problem: Problem) -> None:
    """Prefill, one decode step and a chunk, with positions, give the rows of one pass, below, at and beyond N (4.3)."""
    problem = problem.replace(starts=None, num_queries=problem.num_keys)
    q, k, v = (problem.arguments[name] for name in "qkv")
    whole = attend(fn, problem)
    middle = problem.cut % problem.num_keys
    for start, end in pairwise(sorted({0, middle, middle + 1, problem.num_keys})):
        rows = torch.arange(start, end, device=problem.device)
        step = attend(fn, problem, q=q[:, :, start:end], k=k[:, :, :end], v=v[:, :, :end], positions=rows)
        assert_agree(whole, step, slice(start, end), f"rows {start}..{end - 1}")


@law(takes=BASIC, needs=("positions", "visible"))
def packed_is_one_by_one(fn: Attention, problem: Problem) -> None:
    """Documents laid one after another, positions restarting at 0, give what each gives alone."""
    problem = problem.replace(starts=None, num_queries=problem.num_keys, window=-1, hidden=0.0)
    packed = attend(fn, problem)
    for start, end in pairwise((0, *problem.documents, problem.num_keys)):
        alone = {name: problem.arguments[name][:, :, start:end] for name in "qkv"}
        assert_agree(
            packed, attend(fn, problem, **alone, positions=None, visible=None), slice(start, end), f"document at {start}"
        )


@law(takes=BASIC, needs=("positions", "visible"))
def padding_changes_nothing(fn: Attention, problem: Problem) -> None:
    """Slots of padding before a sequence, and unused ones after it, hidden by a mask; positions start at the first token."""
    pad, unused = problem.cut % 4, problem.cut // 4 % 4
    problem = problem.replace(starts=None, documents=(), num_queries=problem.num_keys, window=-1, hidden=0.0)
    rows = slice(pad, pad + problem.num_keys)
    q, k, v = (torch.nn.functional.pad(problem.arguments[name], (0, 0, pad, unused), value=3.0) for name in "qkv")
    slots = torch.arange(q.shape[2], device=problem.device)
    visible = (slots <= slots.unsqueeze(1)) & (slots >= rows.start) & (slots < rows.stop)
    visible = visible.expand(problem.batch, 1, -1, -1).contiguous()
    padded = attend(fn, problem, q=q, k=k, v=v, visible=visible, positions=(slots - pad).clamp(min=0))
    assert_agree(padded, attend(fn, problem), rows)


@law(takes=NO_SINK)
def infinite_gamma_is_causal_attention(fn: Attention, problem: Problem) -> None:
    """gamma = inf leaves no mass: PyTorch's own causal scaled_dot_product_attention, in float64."""
    output = attend(fn, problem.replace(gamma=math.inf))
    q, k, v = (problem.arguments[name].double() for name in "qkv")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    causal = sdpa(q, k, v, is_causal=True, scale=problem.scale, enable_gqa=True)
    assert_within(output.out, causal, output.out_budget + 1e-10, "out")


@law()
def batch_and_heads_are_independent(fn: Attention, problem: Problem) -> None:
    """Permuting the batch, and whole groups of heads with their gammas and sinks, permutes the output."""
    arguments, device = problem.arguments, problem.device
    batch = torch.arange(problem.batch, device=device).roll(1 + problem.cut)
    groups = problem.heads // problem.kv_heads
    kv = torch.arange(problem.kv_heads, device=device).roll(1 + problem.cut)
    heads = (kv.unsqueeze(1) * groups + torch.arange(groups, device=device)).flatten()
    moved = {"q": arguments["q"][batch][:, heads], "k": arguments["k"][batch][:, kv], "v": arguments["v"][batch][:, kv]}
    moved |= {name: arguments[name][heads] for name in ("gamma", "sink") if name in arguments}
    if "sink_value" in arguments:
        moved["sink_value"] = arguments["sink_value"][kv if problem.sink_values == problem.kv_heads else heads]
    if problem.positions is not None and problem.positions.dim() == 2:
        moved["positions"] = problem.positions[batch]
    if problem.visible is not None:
        moved["visible"] = problem.visible[batch]
    whole = attend(fn, problem)
    there = None if whole.lse is None else whole.lse[batch][:, heads]
    assert_agree(
        attend(fn, problem, **moved),
        Output(whole.out[batch][:, heads], there, whole.out_budget, whole.lse_budget[batch][:, heads]),
    )


@law()
def linear_in_v(fn: Attention, problem: Problem) -> None:
    """out(a - 2b) = out(a) - 2 out(b), for a and b the values at even and at odd slots, which any dtype adds exactly.

    A sink's value is one of the values: it goes with a.
    """
    v = problem.arguments["v"]
    even = (torch.arange(problem.num_keys, device=problem.device) % 2 == 0).unsqueeze(-1)
    rest = {"sink_value": torch.zeros_like(problem.sink_value_HD)} if "sink_value" in problem.arguments else {}
    a, b = attend(fn, problem, v=v * even), attend(fn, problem, v=v * ~even, **rest)
    both = attend(fn, problem, v=torch.where(even, v, -2 * v))
    budget = both.out_budget + a.out_budget + 2 * b.out_budget
    assert_within(both.out, a.out.double() - 2 * b.out.double(), budget, "out")


@law(gradient=True)
def gradients(fn: Attention, problem: Problem) -> None:
    """dq, dk and dv of eq. 11: dS = P' * (dP - rowsum(dout * out)), for P' = exp(score - l')."""
    assert_gradients(fn, problem, constants=("gamma",))


@law(gradient=True, finite_gamma=True)
def gradient_of_gamma(fn: Attention, problem: Problem) -> None:
    """d gamma of eq. 11, for a gamma that requires grad: d log M = -(1 - s) * rowsum(dout * out)."""
    assert_gradients(fn, problem)


@law(takes=(*BASIC, "positions", "visible"), needs=("sink",), gradient=True)
def gradient_of_sink(fn: Attention, problem: Problem) -> None:
    """d sink of eq. 11, for a sink that requires grad: the sum over its rows of exp(sink - l') * (dout . v - dout . out).

    v is the sink's value, 0 where it has none.
    """
    assert_gradients(fn, problem, constants=("gamma",), learned=("sink",))


@law(needs=("sink_value",), gradient=True)
def gradient_of_sink_value(fn: Attention, problem: Problem) -> None:
    """d sink_value of eq. 11, for one that requires grad: the sum over its rows of exp(sink - l') * dout; d sink beside it."""
    assert_gradients(fn, problem, constants=("gamma",), learned=("sink", "sink_value"))


@law(gradient=True)
def gradient_of_lse(fn: Attention, problem: Problem) -> None:
    """A loss that reaches l' too: dS gains P' * dlse, or the backward raises; never dropped in silence."""
    require_lse(attend(fn, problem))
    assert_gradients(fn, problem, constants=("gamma",), with_lse_grad=True)
