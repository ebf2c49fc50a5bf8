"""A chunk of queries against more keys on a CPU, in parts merged by their log-sum-exp, against eq. 11."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from sm_flex import flex_attention, scaled_dot_product_attention, stablemask
from sm_flex.engines import cpu_chunks
from sm_flex.testing import assert_matches_eq11
from tests.helpers.problems import gamma_of, qkv

HEADS, KV_HEADS, LENGTH = 4, 2, 60
SHAPES = [(2, 3), (29, 30), (2, 70), (13, 23), (30, 37)]  # S, T


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_chunks, "ROWS", 1)
    monkeypatch.setattr(cpu_chunks, "KEYS", 4)


def positions(num_queries: int, num_keys: int) -> Tensor:
    return torch.arange(num_keys - num_queries, num_keys)


def with_lse(num_queries: int, num_keys: int, scale: float | None = None) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor | None]:
        mask = stablemask(gamma, length=LENGTH, positions=positions(num_queries, num_keys))
        aux = AuxRequest(lse=True)
        out, aux = flex_attention(q, k, v, score_mod=mask, scale=scale, enable_gqa=True, return_aux=aux)
        return out, aux.lse

    return run


def with_mask(attn_mask: Tensor, num_queries: int, num_keys: int) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor | None]:
        mask = stablemask(gamma, length=LENGTH, positions=positions(num_queries, num_keys))
        return scaled_dot_product_attention(q, k, v, attn_mask, score_mod=mask, enable_gqa=True), None

    return run


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v_dim", [8, 5])
@pytest.mark.parametrize(("num_queries", "num_keys"), SHAPES)
def test_out_lse_and_gradients(num_queries: int, num_keys: int, v_dim: int, dtype: torch.dtype):
    inputs = qkv(2, HEADS, KV_HEADS, num_queries, num_keys, 8, dtype, v_dim=v_dim)
    options = {"length": LENGTH, "positions": positions(num_queries, num_keys)}
    run = with_lse(num_queries, num_keys)
    assert_matches_eq11(run, [*inputs, gamma_of(HEADS, dtype)], options, with_lse_grad=True)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_scale(scale: float):
    inputs = [*qkv(2, HEADS, KV_HEADS, 13, 23, 8), gamma_of(HEADS, torch.float64)]
    options = {"length": LENGTH, "positions": positions(13, 23), "scale": scale}
    assert_matches_eq11(with_lse(13, 23, scale), inputs, options, with_lse_grad=True)


def masks() -> dict[str, Tensor]:
    """For S = 13 and T = 23: which keys each query sees beside causality. Slots 0 to 9 are the rectangle, 10 to 22 the square."""
    slots = torch.arange(23)
    hides_rectangle, hides_square = slots >= 10, slots < 10
    per_row = torch.rand(2, HEADS, 13, 23) > 0.4
    per_row[1, :, 3:6] = False
    return {
        "left padding": torch.stack([slots >= 4, slots >= 12]).reshape(2, 1, 1, 23),  # rows 0, 1 of the second see nothing
        "no rectangle": hides_rectangle.reshape(1, 1, 1, 23),
        "no square, one head sees nothing": torch.stack([hides_square] * 3 + [slots < 0]).reshape(1, HEADS, 1, 23),
        "holes": (torch.rand(2, HEADS, 1, 23) > 0.5),
        "one element for each head": torch.tensor([True, False, True, True]).reshape(1, HEADS, 1, 1),
        "rows": per_row,
        "one element for each row": per_row[..., :1],
    }


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_masks(dtype: torch.dtype, name: str, floating: bool):
    """A part that a mask hides counts for nothing, and a fully masked row is 0 with gradients of 0."""
    seen = masks()[name]
    attn_mask = torch.where(seen, torch.randn(seen.shape).to(dtype), -math.inf) if floating else seen
    options: dict[str, Any] = {"length": LENGTH, "positions": positions(13, 23)}
    options |= {"bias": attn_mask} if floating else {"visible": seen}
    inputs = [*qkv(2, HEADS, KV_HEADS, 13, 23, 8, dtype), gamma_of(HEADS, dtype)]
    assert_matches_eq11(with_mask(attn_mask, 13, 23), inputs, options)


@pytest.mark.usefixtures("small_parts")
def test_a_fully_masked_row_without_mass():
    """lse' = -inf: gamma = inf, and no part has a key for the first rows of the second sequence."""
    inputs = [*qkv(2, HEADS, KV_HEADS, 13, 23, 8), torch.tensor(math.inf).double()]
    seen = masks()["left padding"]
    options = {"length": LENGTH, "positions": positions(13, 23), "visible": seen}
    assert_matches_eq11(with_mask(seen, 13, 23), inputs, options, constants=["gamma"])
    q, k, v = [x.requires_grad_() for x in inputs[:3]]
    out, _ = with_mask(seen, 13, 23)(q, k, v, inputs[3])
    assert (out[1, :, :2] == 0).all()
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.square().sum(), (q, k, v)))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("louder", ["rectangle", "square"])
def test_one_part_has_all_the_weight(louder: str, dtype: torch.dtype):
    """Scores of 600 in one part and of 0 in the other: e^-600 is below the least float32."""
    q, k, v = qkv(1, HEADS, KV_HEADS, 13, 23, 8, dtype)
    part = slice(0, 10) if louder == "rectangle" else slice(10, 23)
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, part, 0] = 600 * math.sqrt(8)
    options = {"length": LENGTH, "positions": positions(13, 23)}
    inputs = [q, k, v, gamma_of(HEADS, dtype)]
    assert_matches_eq11(with_lse(13, 23), inputs, options, with_lse_grad=True, sums_cancel=True)


def test_parts_are_the_call_with_a_bias(monkeypatch: pytest.MonkeyPatch):
    inputs = [*qkv(2, HEADS, KV_HEADS, 30, 37, 8), gamma_of(HEADS, torch.float64)]
    assert not cpu_chunks.takes(30, 37)
    whole = with_lse(30, 37)(*inputs)
    monkeypatch.setattr(cpu_chunks, "ROWS", 1)
    assert cpu_chunks.takes(30, 37)
    torch.testing.assert_close(with_lse(30, 37)(*inputs), whole, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("small_parts")
def test_what_a_part_may_not_reach():
    """A NaN in the last key reaches the last query alone, in the output and in dq."""
    q, k, v = [x.requires_grad_() for x in qkv(1, HEADS, KV_HEADS, 13, 23, 8)]
    k.data[:, :, -1] = math.nan
    out, _ = with_lse(13, 23)(q, k, v, gamma_of(HEADS, torch.float64))
    (dq,) = torch.autograd.grad(out[:, :, :-1].sum(), q)
    assert out[:, :, -1].isnan().all()
    assert out[:, :, :-1].isfinite().all()
    assert dq[:, :, :-1].isfinite().all()


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("rows", [False, True])
def test_a_second_derivative_is_refused(rows: bool):
    q, k, v = [x.requires_grad_() for x in qkv(1, HEADS, KV_HEADS, 13, 23, 8)]
    attn_mask = torch.ones(13 if rows else 1, 23, dtype=torch.bool)
    out, _ = with_mask(attn_mask, 13, 23)(q, k, v, gamma_of(HEADS, torch.float64))
    (dq,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="is not implemented"):
        dq.sum().backward()


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("name", ["left padding", "rows"])
def test_nothing_of_the_mask_is_kept_but_itself(name: str):
    """A mask written to before the backward is an error: its part of the bias is made from it again."""
    q, k, v = [x.requires_grad_() for x in qkv(2, HEADS, KV_HEADS, 13, 23, 8)]
    attn_mask = masks()[name]
    out, _ = with_mask(attn_mask, 13, 23)(q, k, v, gamma_of(HEADS, torch.float64))
    attn_mask.fill_(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_rounds_no_more_than_one_call(dtype: torch.dtype):
    """Merged in float32 and rounded once. dq, which parts add to, is summed in float32: its error is no more than one call's."""
    q, k, v = qkv(1, 1, 1, 24, 4096, 32, dtype)
    gamma, grad = torch.tensor([0.5]), torch.randn(1, 1, 24, 32).to(dtype)

    def run(*inputs: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        mask = stablemask(
            gamma.to(torch.promote_types(inputs[0].dtype, torch.float32)), length=4096, positions=positions(24, 4096)
        )
        out = flex_attention(*leaves, score_mod=mask)  # pyright: ignore
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]  # pyright: ignore

    exact, one_call = run(q.double(), k.double(), v.double()), run(q, k, v)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_chunks, "ROWS", 1)
        parts = run(q, k, v)
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), parts, one_call, exact, strict=True):
        errors = [(found.double() - z).norm() / z.norm() for found in (x, y)]
        # Two roundings of out, of a part and of the sum, where one call has those of out, of its share and of the product.
        assert errors[0] <= (1.1 if name == "dq" else 1.5) * errors[1], name
