"""sm_flex_nanogpt's attention against eq. 11: values, gradients, dropout, lengths, torch.compile."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sm_flex.testing import oracle
from sm_flex_launcher.flags import Flags, parse_flags
from sm_flex_nanogpt import attention
from tests.helpers.launching import Checkout, checked_out

GAMMAS = ("headwise", "0.5", "0.25,0,2")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkout]:
    with checked_out("nanogpt", tmp_path / "nanoGPT", monkeypatch) as made:
        yield made


def asked(gamma: str) -> Flags:
    return parse_flags(["--attn=stablemask", f"--gamma={gamma}"])[0]


def one_layer(checkout: Checkout, gamma: str, dropout: float = 0.0) -> Any:
    model = checkout.module("model")
    config = model.GPTConfig(block_size=13, n_head=3, n_embd=15, dropout=dropout)
    return attention.stable(model.CausalSelfAttention, asked(gamma))(config).double()


def by_the_oracle(layer: Any, x: torch.Tensor, gamma: str, length: int) -> torch.Tensor:
    """c_attn, eq. 11 with N = length, c_proj."""
    q, k, v = [part.reshape(*x.shape[:2], 3, 5).transpose(1, 2) for part in layer.c_attn(x).split(15, dim=2)]
    out, _ = oracle(q, k, v, gamma=asked(gamma).gamma_for(3), length=length)
    return layer.c_proj(out.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("tokens", [1, 7, 13])
def test_attention_is_equation_11_with_n_the_block_size(checkout: Checkout, gamma: str, tokens: int) -> None:
    layer = one_layer(checkout, gamma)
    x = torch.randn(2, tokens, 15, dtype=torch.float64, requires_grad=True)
    weights = [x, *layer.parameters()]
    ours, expected = layer(x), by_the_oracle(layer, x, gamma, 13)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(ours)
    pairs = zip(torch.autograd.grad(ours, weights, grad), torch.autograd.grad(expected, weights, grad), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(ours[:, 0], by_the_oracle(layer, x, gamma, 14)[:, 0], rtol=1e-6, atol=0)


def test_a_cropped_model_has_the_new_length(checkout: Checkout) -> None:
    model = checkout.module("model")
    attention.replace(model, asked("0.1"))
    gpt = model.GPT(model.GPTConfig(block_size=13, n_head=3, n_embd=15)).double()
    gpt.crop_block_size(7)
    layer, x = gpt.h[1].attn, torch.randn(2, 7, 15, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_the_oracle(layer, x, "0.1", 7), rtol=1e-10, atol=1e-10)


def test_weights_and_state_dict_are_those_of_the_checkout(checkout: Checkout) -> None:
    model = checkout.module("model")
    torch.manual_seed(1)
    plain = model.GPT(model.GPTConfig()).state_dict()
    torch.manual_seed(1)
    attention.replace(model, asked("headwise"))
    ours = model.GPT(model.GPTConfig()).state_dict()
    assert list(ours) == list(plain)
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), plain.values(), strict=True))


def test_dropout_falls_on_the_attention_weights(checkout: Checkout) -> None:
    layer = one_layer(checkout, "0.5", dropout=0.4)
    layer.resid_dropout.p = 0.0
    x = torch.randn(1, 7, 15, dtype=torch.float64)
    expected = by_the_oracle(layer, x, "0.5", 13)
    draws = torch.stack([layer(x) for _ in range(3000)]).detach()
    assert not torch.equal(draws[0], draws[1])
    error = draws.std(0) / math.sqrt(3000)
    assert ((draws.mean(0) - expected).abs() <= 5 * error).all()
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-10, atol=1e-10)


def test_dropout_falls_on_the_residual_too(checkout: Checkout) -> None:
    layer = one_layer(checkout, "0.5", dropout=0.5)
    layer.dropout = 0.0
    x = torch.randn(3, 13, 15, dtype=torch.float64)
    out, doubled = layer(x), 2 * by_the_oracle(layer, x, "0.5", 13)
    dropped = out == 0
    assert 0.4 < dropped.double().mean() < 0.6
    torch.testing.assert_close(out, doubled.masked_fill(dropped, 0.0), rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_into_one_graph_and_never_again_for_another_gamma(checkout: Checkout) -> None:
    model = checkout.module("model")
    attention.replace(model, asked("headwise"))
    gpt = model.GPT(model.GPTConfig())
    compiled = torch.compile(gpt, fullgraph=True, backend="aot_eager")
    idx = torch.randint(29, (2, 16))
    before = compiled(idx, idx)[1]
    torch.testing.assert_close(before, gpt(idx, idx)[1])
    for block in gpt.h:
        block.attn.gamma.fill_(math.inf)
    with torch._dynamo.config.patch(error_on_recompile=True):
        after = compiled(idx, idx)[1]
    torch.testing.assert_close(after, gpt(idx, idx)[1])
    assert after != before


def test_plain_attention_is_what_the_stand_in_has(checkout: Checkout) -> None:
    """The probe compares with something: the stand-in is causal softmax attention."""
    model = checkout.module("model")
    layer = model.CausalSelfAttention(model.GPTConfig(n_head=3, n_embd=15)).double()
    x = torch.randn(2, 7, 15, dtype=torch.float64)
    q, k, v = [part.reshape(2, 7, 3, 5).transpose(1, 2) for part in layer.c_attn(x).split(15, dim=2)]
    scores = (q @ k.transpose(-1, -2) / math.sqrt(5)).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
    by_hand = layer.c_proj((F.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(layer(x), by_hand)
