"""Theorem 4.1 by its own construction (Appendix C): hand-set weights read the position off one head, in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sm_flex import flex_attention, stablemask

WIDTH, HEAD_DIM, VOCABULARY = 5, 3, 11


def first_attention_layer(tokens_S: Tensor, gamma: float) -> Tensor:
    """Omega (S, W) after the first attention layer of eqs. 23 to 26: W_E's rows 1 and 0, W_Q = W_K = 0, one head."""
    embedding_VW = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)
    embedding_VW[:, 0], embedding_VW[:, 1] = 1, 0
    w_v, w_o = torch.zeros(HEAD_DIM, WIDTH, dtype=torch.float64), torch.zeros(WIDTH, HEAD_DIM, dtype=torch.float64)
    w_v[0, 0] = w_o[1, 0] = 1  # the head reads dimension 1 and writes dimension 2
    x_SW = embedding_VW[tokens_S]
    q = k = torch.zeros(1, 1, len(tokens_S), HEAD_DIM, dtype=torch.float64)
    out = flex_attention(q, k, (x_SW @ w_v.T)[None, None], score_mod=stablemask(gamma, length=len(tokens_S)))
    return x_SW + out[0, 0] @ w_o.T


def xi(length: int, gamma: float) -> Tensor:
    """xi_i = i / (i + sum_{j=i}^{n-1} e^{-j gamma}), i = 1..n, term by term."""
    pseudo = [sum(math.exp(-j * gamma) for j in range(i, length)) for i in range(1, length + 1)]
    return torch.tensor([i / (i + mass) for i, mass in enumerate(pseudo, start=1)], dtype=torch.float64)


@given(st.integers(1, 150), st.floats(0, 3), st.integers(0, 2**32))
def test_the_construction_gives_xi_exactly(length: int, gamma: float, seed: int) -> None:
    torch.manual_seed(seed)
    tokens_S = torch.randint(VOCABULARY, (length,))
    omega_SW = first_attention_layer(tokens_S, gamma)
    torch.testing.assert_close(omega_SW[:, 1], xi(length, gamma), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("gamma", [0.0, 2**-8, 0.1])
def test_a_feed_forward_layer_turns_xi_into_the_position(gamma: float) -> None:
    """W_1 and W_2 by hand too: relu(xi - xi_k) with the slopes of the line through the points (xi_i, i)."""
    length = 97
    points = xi(length, gamma)
    slopes = 1 / points.diff()
    w_2 = torch.cat([slopes[:1], slopes.diff()])

    def position(omega_SW: Tensor) -> Tensor:
        return 1 + torch.relu(omega_SW[:, 1:2] - points[:-1]) @ w_2

    tokens_S = torch.randint(VOCABULARY, (length,))
    answer = position(first_attention_layer(tokens_S, gamma))
    torch.testing.assert_close(answer, torch.arange(1, length + 1, dtype=torch.float64), rtol=0, atol=1e-4)
    # Plain causal attention writes a 1 in every row: nothing after it can tell them apart.
    causal = position(first_attention_layer(tokens_S, math.inf))
    torch.testing.assert_close(causal, causal[:1].expand(length), rtol=0, atol=1e-4)
