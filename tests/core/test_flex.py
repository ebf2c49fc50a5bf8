"""flex_attention on every CPU engine against the oracle: out, lse, dq, dk, dv, d gamma, and the gradient through lse."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

from sm_flex import flex_attention, scaled_dot_product_attention, stablemask, varlen_attn
from sm_flex.testing import assert_matches_eq11, oracle
from sm_flex.testing.gradients import outputs_and_gradients
from tests.helpers.problems import DTYPES, alibi, alibi_bias, flex_with_lse, gamma_of, packed, qkv
from tests.helpers.watching import engines_used

BACKENDS = ["FLASH_ATTENTION", "MATH"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_rows", [1, 2, 13, 128, 131])
def test_square(backend: str, dtype: torch.dtype, num_rows: int):
    inputs = [*qkv(2, 6, 3, num_rows, num_rows, 16, dtype), gamma_of(6, dtype)]
    assert_matches_eq11(flex_with_lse(backend, length=100), inputs, {"length": 100})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_through_lse(backend: str, dtype: torch.dtype):
    inputs = [*qkv(2, 6, 2, 29, 29, 24, dtype), gamma_of(6, dtype)]
    assert_matches_eq11(flex_with_lse(backend, length=64), inputs, {"length": 64}, with_lse_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 7, 18, 19, 20, 1000])
def test_lengths_below_at_and_beyond(backend: str, length: int):
    inputs = [*qkv(1, 2, 1, 19, 19, 5), gamma_of(2, torch.float64)]
    assert_matches_eq11(flex_with_lse(backend, length=length), inputs, {"length": length}, with_lse_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [0.0, 1e-8, 0.5, 30.0])
def test_learned_scalar_gamma(backend: str, gamma: float):
    assert_matches_eq11(flex_with_lse(backend), [*qkv(2, 3, 3, 23, 23, 7), torch.tensor(gamma).double()], with_lse_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [1e4, math.inf])
def test_no_mass_left_is_causal_attention(backend: str, gamma: float):
    q, k, v = qkv(2, 3, 3, 23, 23, 8)
    out = flex_attention(q, k, v, score_mod=stablemask(gamma), kernel_options={"BACKEND": backend})
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 11), (5, 17), (64, 130)])
def test_decode_chunk(backend: str, dtype: torch.dtype, num_queries: int, num_keys: int):
    positions = torch.arange(num_keys - num_queries, num_keys)
    inputs = [*qkv(2, 4, 2, num_queries, num_keys, 8, dtype), gamma_of(4, dtype)]
    assert_matches_eq11(flex_with_lse(backend, length=150, positions=positions), inputs, {"length": 150, "positions": positions})


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_queries_than_keys_leaves_fully_masked_rows(backend: str):
    """Rows that see no key: output 0, finite gradients, lse' = log M."""
    positions = torch.arange(11)
    inputs = [*qkv(1, 2, 2, 11, 4, 8), gamma_of(2, torch.float64)]
    assert_matches_eq11(
        flex_with_lse(backend, length=9, positions=positions),
        inputs,
        {"length": 9, "positions": positions},
        with_lse_grad=True,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_of_each_row_of_the_batch(backend: str):
    positions = torch.tensor([[0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 0, 900]])
    inputs = [*qkv(2, 4, 2, 7, 7, 8), gamma_of(4, torch.float64)]
    kwargs = {"length": 8, "positions": positions}
    assert_matches_eq11(flex_with_lse(backend, **kwargs), inputs, kwargs)


@pytest.mark.parametrize(("batch", "rows"), [(0, 5), (2, 0)])
def test_empty(batch: int, rows: int):
    q, k, v = (x.requires_grad_() for x in qkv(batch, 4, 2, rows, rows, 8))
    out, aux = flex_attention(q, k, v, score_mod=stablemask(0.3, length=9), enable_gqa=True, return_aux=AuxRequest(lse=True))
    out.sum().backward()
    assert out.shape == (batch, 4, rows, 8)
    assert aux.lse is not None
    assert aux.lse.shape == (batch, 4, rows)
    assert q.grad is not None
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_inner_score_mod(dtype: torch.dtype):
    bias = alibi_bias(6, 29)
    inputs = [*qkv(2, 6, 3, 29, 29, 8, dtype), gamma_of(6, dtype)]
    assert_matches_eq11(flex_with_lse(length=40, score_mod=alibi), inputs, {"length": 40, "bias": bias}, with_lse_grad=True)


def test_tensor_captured_by_an_inner_score_mod_gets_its_gradient(monkeypatch: pytest.MonkeyPatch):
    """Through several blocks of rows, each computed again in the backward; b and h index one after the other."""
    import sm_flex.engines.dense as dense

    monkeypatch.setattr(dense, "BLOCK_SCORES", 1)
    inputs = [*qkv(1, 4, 2, 70, 70, 8), gamma_of(4, torch.float64), torch.randn(1, 4, dtype=torch.float64)]

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, table: Tensor):
        def inner(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score * table[b][h]

        return flex_attention(q, k, v, score_mod=stablemask(gamma, score_mod=inner), enable_gqa=True), None

    def reference(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, table: Tensor):
        return oracle(q * table.reshape(1, 4, 1, 1), k, v, gamma=gamma)[0], None

    grad_out = torch.randn(1, 4, 70, 8, dtype=torch.float64)
    expected = outputs_and_gradients(reference, inputs, grad_out, None)
    for a, b in zip(outputs_and_gradients(run, inputs, grad_out, None), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_sdpa_kernel_is_honoured(monkeypatch: pytest.MonkeyPatch):
    q, k, v = qkv(1, 2, 2, 13, 13, 8)
    with engines_used(monkeypatch) as used:
        with sdpa_kernel(SDPBackend.MATH):
            flex_attention(q, k, v, score_mod=stablemask(0.3))
        assert used == []
        flex_attention(q, k, v, score_mod=stablemask(0.3))
        assert used == ["cpu"]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), pytest.raises(RuntimeError, match="No available kernel"):
        flex_attention(q, k, v, score_mod=stablemask(0.3))


def test_a_number_is_kept_in_float64():
    """gamma = 0.1 is the float64 0.1 for float64 inputs, not its float32 neighbour."""
    q, k, v = qkv(1, 2, 2, 40, 40, 8)
    out = flex_attention(q, k, v, score_mod=stablemask(0.1))
    torch.testing.assert_close(out, oracle(q, k, v, gamma=0.1)[0], rtol=0, atol=1e-13)


def test_a_rolled_cache_gives_the_same_step():
    """One query against a ring buffer: the keys' order in their slots does not matter, its position does."""
    q, k, v = qkv(2, 4, 2, 1, 11, 8)
    mask = stablemask(0.2, length=32, positions=torch.tensor([19]))
    straight = flex_attention(q, k, v, score_mod=mask, enable_gqa=True)
    rolled = flex_attention(q, k.roll(4, 2), v.roll(4, 2), score_mod=mask, enable_gqa=True)
    torch.testing.assert_close(rolled, straight)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_spread_as_in_causal_attention(name: str, value: float):
    """In the output and the gradients of the same engine: not one element further, not one less."""
    inputs = dict(zip("qkv", qkv(1, 2, 2, 40, 40, 8), strict=True))
    inputs[name][0, 0, 17, 3] = value

    def finite(fn) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        out = fn(*leaves)
        return [torch.isfinite(x) for x in (out, *torch.autograd.grad(out.sum(), leaves))]

    plain = finite(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    ours = finite(lambda q, k, v: flex_attention(q, k, v, score_mod=stablemask(0.2, length=64)))
    assert not all(x.all() for x in plain)
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b)


def test_other_devices_are_served_by_the_dense_engine():
    """What MPS and XPU would run, on the meta device: shapes, dtypes and devices of every drop-in, forward and backward."""
    q, k, v = (torch.empty(2, 4, 7, 8, device="meta", requires_grad=True) for _ in range(3))
    mask = stablemask(0.5, length=9)
    block_mask = create_block_mask(lambda b, h, i, j: i - j < 3, None, None, 7, 7, device="meta")
    outs = [
        flex_attention(q, k, v, score_mod=mask),
        flex_attention(q, k, v, score_mod=mask, block_mask=block_mask),
        scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1, score_mod=mask),
    ]
    cu = torch.empty(3, device="meta", dtype=torch.int32)
    outs.append(varlen_attn(packed(q), packed(k), packed(v), cu, cu, 4, 4, window_size=(-1, 0), score_mod=mask))
    for out in outs:
        assert isinstance(out, Tensor)
        assert out.device.type == "meta"
        assert out.dtype == torch.float32
        out.sum().backward()
    assert outs[0].shape == (2, 4, 7, 8)
    assert outs[-1].shape == (7, 4, 8)
    with pytest.raises(NotImplementedError, match=r"FLASH_ATTENTION cannot serve.*MATH is the only one"):
        flex_attention(q, k, v, score_mod=mask, kernel_options={"BACKEND": "FLASH_ATTENTION"})
