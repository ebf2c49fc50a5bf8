"""The second call of a kind goes straight to the kernel (sm_flex/plans.py): it must find, refuse and cost what it should."""

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest
from torch.utils.checkpoint import checkpoint

from sm_flex import StableMask, flex_attention, headwise_gamma, plans, scaled_dot_product_attention, stablemask
from sm_flex.mass import cache
from sm_flex.testing import assert_matches_eq11, oracle
from tests.helpers.problems import gamma_of, leaves, qkv

HEADS, LENGTH = 4, 2**21
KINDS = ["no sink", "sink", "sink per row", "sink with a value", "sink alone"]


@pytest.fixture(autouse=True)
def _no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_PLANS", {})


def sink_of(kind: str, rows: int) -> list[Tensor]:
    if kind == "no sink":
        return []
    shape = (2, HEADS, rows) if kind == "sink per row" else (HEADS,)
    sink = [torch.randn(shape, dtype=torch.float64)]
    return [*sink, torch.randn(HEADS, 8, dtype=torch.float64)] if kind == "sink with a value" else sink


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry", ["sdpa", "flex", "flex with lse"])
@pytest.mark.parametrize("rows", [1, 9])
def test_the_second_call_is_equation_11_too(rows: int, entry: str, kind: str, learned: bool):
    positions = torch.tensor([8]) if rows == 1 else None
    sink = sink_of(kind, rows)
    gamma = torch.tensor(math.inf, dtype=torch.float64) if kind == "sink alone" else gamma_of(HEADS, torch.float64)

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, *sink: Tensor) -> tuple[Tensor, Tensor | None]:
        if kind == "sink alone" or not learned:
            gamma = gamma.detach()
        level, value = [*sink, None, None][:2]
        mask = stablemask(gamma, length=40, positions=positions, sink=level, sink_value=value)
        if entry == "sdpa":
            return scaled_dot_product_attention(q, k, v, is_causal=rows > 1, score_mod=mask, enable_gqa=True), None
        if entry == "flex":
            return flex_attention(q, k, v, score_mod=mask, enable_gqa=True), None
        return flex_attention(q, k, v, score_mod=mask, enable_gqa=True, return_lse=True)

    inputs = [*qkv(2, HEADS, 2, rows, 9, 8), gamma, *sink]
    constants = ["gamma"] if kind == "sink alone" or not learned else []
    names = {1: lambda sink: {"sink": sink}, 2: lambda sink, value: {"sink": sink, "sink_value": value}}

    def options(*extra: Tensor) -> dict[str, Any]:
        own = names[len(extra)](*extra) if extra else {}
        return {"length": 40, "positions": torch.arange(9)[-rows:], **own}

    for _ in range(2):
        assert_matches_eq11(run, inputs, options, constants=constants, with_lse_grad=entry == "flex with lse")
        assert len(plans._PLANS) == 1
    recorded = run(*inputs)
    with torch.no_grad():
        torch.testing.assert_close(run(*inputs), recorded, rtol=0, atol=1e-14)


@pytest.mark.parametrize("positions", [[0], [255], [256], [3, 700], [2**20, 2**20 + 300], [0, 2**20], [LENGTH - 1, LENGTH]])
@pytest.mark.parametrize("gamma", [0.0, 2.0**-12, headwise_gamma(HEADS)])
def test_a_row_is_the_same_wherever_its_block_begins(gamma: Any, positions: list[int]):
    q, k, v = qkv(len(positions), HEADS, HEADS, 1, 5, 8)
    places = torch.tensor(positions).unsqueeze(1)
    q_rows, rows = q.expand(-1, -1, 80, -1), places.expand(-1, 80)  # 80 rows are computed, not looked up
    many = scaled_dot_product_attention(
        q_rows, k, v, torch.ones(80, 5, dtype=torch.bool), score_mod=stablemask(gamma, length=LENGTH, positions=rows)
    )
    for _ in range(2):
        one = scaled_dot_product_attention(q, k, v, score_mod=stablemask(gamma, length=LENGTH, positions=places))
        torch.testing.assert_close(one, many[:, :, -1:], rtol=0, atol=1e-13)


def decode(mask: StableMask) -> Tensor:
    torch.manual_seed(0)
    q, k, v = qkv(2, HEADS, HEADS, 1, 9, 8)
    return scaled_dot_product_attention(q, k, v, score_mod=mask)


def test_a_plan_serves_any_number_of_keys():
    q, k, v = qkv(2, HEADS, HEADS, 1, 40, 8)
    for num_keys in (9, 40, 2, 1):
        mask = stablemask(headwise_gamma(HEADS), length=50, positions=torch.tensor([num_keys - 1]))
        found = scaled_dot_product_attention(q, k[:, :, :num_keys], v[:, :, :num_keys], score_mod=mask)
        expected, _ = oracle(q, k[:, :, :num_keys], v[:, :, :num_keys], gamma=mask.gamma, length=50, positions=mask.positions)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert len(plans._PLANS) == 2
    with pytest.raises(ValueError, match="value must have"):
        scaled_dot_product_attention(q, k, v[:, :, :7], score_mod=mask)


@pytest.mark.parametrize("entry", [flex_attention, scaled_dot_product_attention])
def test_a_checkpointed_layer_saves_the_same_when_it_runs_again(entry: Callable[..., Tensor]):
    """Though its first run had no plan, and its second one has."""
    inputs = leaves(2, HEADS, 9, 8)
    options: dict[str, Any] = {"is_causal": True} if entry is scaled_dot_product_attention else {}
    mask = stablemask(headwise_gamma(HEADS), length=40)
    out = checkpoint(lambda q, k, v: entry(q, k, v, score_mod=mask, **options), *inputs, use_reentrant=False)
    grads = torch.autograd.grad(out.sum(), inputs)  # pyright: ignore[reportAttributeAccessIssue]
    assert len(plans._PLANS) == 1
    torch.testing.assert_close(
        grads, torch.autograd.grad(entry(*inputs, score_mod=mask, **options).sum(), inputs), rtol=0, atol=0
    )


def test_values_are_looked_at_each_time():
    gamma, positions = headwise_gamma(HEADS), torch.tensor([8])
    mask = stablemask(gamma, length=40, positions=positions)
    first = decode(mask)
    torch.testing.assert_close(decode(mask), first, rtol=0, atol=0)
    positions.data.add_(20)
    moved = decode(mask)
    assert not torch.equal(moved, first)
    torch.testing.assert_close(moved, decode(stablemask(gamma, length=40, positions=torch.tensor([28]))), rtol=0, atol=0)
    gamma.data.fill_(0.25)
    torch.testing.assert_close(decode(mask), decode(stablemask(0.25, length=40, positions=positions)), rtol=0, atol=1e-12)


def wide(x: Tensor) -> Tensor:
    return torch.cat([x, x], dim=1)


@pytest.mark.parametrize(
    ("message", "call"),
    {
        "positions must be >= 0": lambda q, k, v, g: scaled_dot_product_attention(
            q, k, v, score_mod=stablemask(g, length=40, positions=torch.tensor([-1]))
        ),
        "positions must be >= 0, got -7": lambda q, k, v, g: scaled_dot_product_attention(
            q, k, v, score_mod=stablemask(math.inf, length=40, sink=0.5, positions=torch.tensor([-7]))
        ),
        "positions are required": lambda q, k, v, g: scaled_dot_product_attention(q, k, v, score_mod=stablemask(g, length=40)),
        "gamma must have one value": lambda q, k, v, g: scaled_dot_product_attention(
            q, k, v, score_mod=stablemask(g[:3], length=40, positions=torch.tensor([8]))
        ),
        "is_causal needs equal lengths": lambda q, k, v, g: scaled_dot_product_attention(
            q, k, v, is_causal=True, score_mod=stablemask(g, length=40, positions=torch.tensor([8]))
        ),
        "enable_gqa": lambda q, k, v, g: scaled_dot_product_attention(
            wide(q), k, v, score_mod=stablemask(0.5, length=40, positions=torch.tensor([8]))
        ),
        "dtype of query": lambda q, k, v, g: scaled_dot_product_attention(
            q, k.float(), v, score_mod=stablemask(g, length=40, positions=torch.tensor([8]))
        ),
        "dropout_p must be a number": lambda q, k, v, g: scaled_dot_product_attention(
            q, k, v, dropout_p=False, score_mod=stablemask(g, length=40, positions=torch.tensor([8]))
        ),
        "scale must be a number": lambda q, k, v, g: scaled_dot_product_attention(
            q, k, v, scale=True, score_mod=stablemask(g, length=40, positions=torch.tensor([8]))
        ),
        "ask for the same twice": lambda q, k, v, g: flex_attention(
            q, k, v, score_mod=stablemask(g, length=40, positions=torch.tensor([8])), return_lse=True,
            return_aux=AuxRequest(lse=True),
        ),
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_what_was_refused_is_refused_beside_a_plan(message: str, call: Callable[..., Any]):
    q, k, v = qkv(2, HEADS, HEADS, 1, 9, 8)
    gamma = headwise_gamma(HEADS)
    for scale in (None, 1.0):
        mask = stablemask(gamma, length=40, positions=torch.tensor([8]))
        scaled_dot_product_attention(q, k, v, scale=scale, score_mod=mask)
        flex_attention(q, k, v, scale=scale, score_mod=mask)
    assert len(plans._PLANS) == 4
    with pytest.raises((TypeError, ValueError), match=message):
        call(q, k, v, gamma)


def test_a_transform_is_refused_and_a_mode_obeyed_beside_a_plan():
    mask = stablemask(headwise_gamma(HEADS), length=40, positions=torch.tensor([8]))
    plain = decode(mask)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(lambda q, k, v: scaled_dot_product_attention(q, k, v, score_mod=mask))(*qkv(2, HEADS, HEADS, 1, 9, 8))
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(decode(mask), plain)
    with pytest.raises(RuntimeError, match="No available kernel"), sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        decode(mask)
    q, k, v = leaves(2, HEADS, 9, 8)
    whole = stablemask(headwise_gamma(HEADS), length=40)
    for _ in range(2):
        flex_attention(q, k, v, score_mod=whole)
        with torch.autocast("cpu", torch.bfloat16):
            assert flex_attention(q, k, v, score_mod=whole).dtype == torch.bfloat16
    with torch.inference_mode():
        flex_attention(q, k, v, score_mod=whole)
    (grad,) = torch.autograd.grad(flex_attention(q, k, v, score_mod=whole).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def python_calls(run: Callable[[], Any]) -> int:
    """Functions written in Python that a run enters."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_the_host_enters_few_functions():
    """What a short call costs beside its kernel: 108 and more before there were plans."""
    q, k, v = leaves(1, HEADS, 9, 8)
    whole, step = stablemask(headwise_gamma(HEADS), length=40), q[:, :, :1].detach()
    masks = [stablemask(headwise_gamma(HEADS), length=40, positions=torch.tensor([p])) for p in (8, 9, 10)]
    calls: dict[str, tuple[int, Callable[[], Any]]] = {
        "training, flex": (35, lambda: flex_attention(q, k, v, score_mod=whole)),
        "training, sdpa": (35, lambda: scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=whole)),
        "decode": (25, lambda: scaled_dot_product_attention(step, k.detach(), v.detach(), score_mod=masks[0])),
        "decode, elsewhere": (26, lambda: scaled_dot_product_attention(step, k.detach(), v.detach(), score_mod=masks.pop())),
    }
    for name, (most, call) in calls.items():
        call()
        found = python_calls(call)
        assert found <= most, f"{name}: {found} calls of functions written in Python"


def test_the_tables_stay_within_their_bounds(monkeypatch: pytest.MonkeyPatch):
    def table_of(gamma: float) -> Tensor:
        return cache.cached_table(cache.Inputs(torch.tensor(float(gamma)), None, None, None, 100, 300, torch.float32))

    tables = cache._Tables()
    monkeypatch.setattr(cache, "_TABLES", tables)
    monkeypatch.setattr(cache, "MAX_ELEMENTS", 4000)
    for gamma in range(40):
        table = table_of(gamma)
        assert tables.elements == sum(x.table.numel() for x in tables.by_key.values()) <= 4000
        assert table_of(gamma) is table
    assert len(tables.by_key) == 4000 // 300
    monkeypatch.setattr(cache, "MAX_TABLES", 5)
    table_of(0.5)
    assert len(tables.by_key) == 5
