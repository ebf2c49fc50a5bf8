"""The model of CUDA's attention ops (tests/helpers/cuda_model): it notices planted faults, and keeps to its own contract."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sm_flex import scaled_dot_product_attention, stablemask
from sm_flex.engines import Call, autograd
from sm_flex.testing import assert_matches_eq11
from tests.helpers.cuda_model import faults
from tests.helpers.problems import flex_with_lse, gamma_of, qkv

pytestmark = [
    pytest.mark.usefixtures("cuda_model"),
    # Triton's interpreter computes both sides of a where() in numpy, which warns of inf - inf.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
BF16 = torch.bfloat16
ROWS, DIM = 37, 16


def inputs(num_queries: int = ROWS, dim: int = DIM, dtype: torch.dtype = BF16) -> list[Tensor]:
    return [*qkv(2, 4, 2, num_queries, ROWS, dim, dtype), gamma_of(4, dtype)]


def square(backend: str, dim: int = DIM) -> None:
    assert_matches_eq11(flex_with_lse(backend, length=40), inputs(dim=dim), {"length": 40}, with_lse_grad=True)


def chunk(backend: str) -> None:
    """Five queries at the end of the keys: a bias, but for flash."""
    kwargs = {"length": 40, "positions": torch.arange(ROWS - 5, ROWS)}
    assert_matches_eq11(flex_with_lse(backend, **kwargs), inputs(5), kwargs)


def more_queries_than_keys(backend: str) -> None:
    """The first rows are fully masked."""
    kwargs = {"length": 80, "positions": torch.arange(ROWS + 13)}
    assert_matches_eq11(flex_with_lse(backend, **kwargs), inputs(ROWS + 13), kwargs, with_lse_grad=True)


def masked(backend: str) -> None:
    """A fully masked row that has mass, one that has none, and a gradient of the mask where the kernel gives it."""

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            score_mod = stablemask(gamma, length=ROWS)
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, score_mod=score_mod, enable_gqa=kv_heads == 2), None

    kv_heads = 2 if backend == CUDNN else 4  # torch gives the memory-efficient kernel no grouped heads
    q, k, v, gamma = [*qkv(2, 4, kv_heads, ROWS, ROWS, DIM, BF16), gamma_of(4, BF16)]
    if backend == EFFICIENT:
        mask = torch.randn(ROWS, ROWS).to(BF16)
        mask[[0, ROWS - 1]] = -math.inf
        assert_matches_eq11(run, [q, k, v, gamma, mask], lambda mask: {"bias": mask, "length": ROWS})
    else:
        mask = torch.rand(ROWS, ROWS) > 0.4
        mask[[0, ROWS - 1]] = False
        assert_matches_eq11(run, [q, k, v, gamma, mask], lambda mask: {"visible": mask, "length": ROWS})


def dropout(backend: str) -> None:
    """out is linear in v: with values 1, its sum over rows is the sum over keys of dv, for the same draw."""
    q, k, _ = qkv(1, 8, 8, ROWS, ROWS, DIM, torch.float16)
    v = torch.ones_like(q).requires_grad_()
    with sdpa_kernel(getattr(SDPBackend, backend)):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.5, score_mod=stablemask(0.05, length=80))
    (dv,) = torch.autograd.grad(out, v, torch.ones_like(out))
    torch.testing.assert_close(dv[0, ..., 0].float().sum(-1), out[0, ..., 0].float().sum(-1), rtol=2**-8, atol=0)


def after_torchs_own(layout: str) -> None:
    """Masked, after torch's own masked attention: a graph that was built for that finds out where it lay then."""
    q, k, v, gamma = inputs()
    bias = torch.zeros(1, 1, ROWS, ROWS, dtype=BF16).masked_fill(torch.ones(ROWS, ROWS).triu(1).bool(), -math.inf)
    if layout == "BSHD":
        q, k, v = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    call = Call(q, k, v, bias, None, None, False, DIM**-0.5)
    out, lse, state = autograd.KERNELS["cudnn"].forward(call)
    autograd.KERNELS["cudnn"].backward(call, torch.randn_like(out), out, lse, state, False)

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, None]:
        mask = stablemask(gamma, length=ROWS)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, attn_mask=bias, score_mod=mask, enable_gqa=True), None

    assert_matches_eq11(run, [q, k, v, gamma], {"length": ROWS})


FLASH, CUDNN, EFFICIENT = "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"
# What notices each fault, and how.
PLANTS: dict[str, tuple[Callable[..., None], list[Any], str]] = {
    "out_in_bhsd_memory": (square, [EFFICIENT], "out lies in .B, S, H, D. memory"),
    "unpadded_lse": (square, [EFFICIENT], "lse padded to 32 rows"),
    "padded_with_zeros": (square, [EFFICIENT], "lse is padded with .inf"),
    "heads_not_repeated": (square, [EFFICIENT], "as many heads as q"),
    "dv_not_summed": (square, [EFFICIENT], "d[kv]: error"),
    "heads_left_repeated": (square, [EFFICIENT], "invalid gradient at index"),
    "bias_not_aligned": (chunk, [EFFICIENT], "attn_bias has strides"),
    "minus_infinity_in_the_backward": (masked, [EFFICIENT], "dq.*nan|nan.*dq|dq"),
    "seed_for_offset": (dropout, [EFFICIENT], "not close"),
    "cudnn_seed_for_offset": (dropout, [CUDNN], "not close"),
    "statistics_of_three_dimensions": (square, [CUDNN], "cudnn: lse"),
    "statistics_of_other_strides": (square, [CUDNN], "cudnn: contiguous lse"),
    "plus_infinity_in_the_forward": (more_queries_than_keys, [FLASH], "lse: error"),
    "state_swapped": (dropout, [FLASH], "philox_seed is the rng_state"),
    "head_dim_not_padded": (square, [FLASH, 20], "a multiple of 8 up to 256"),
}


@pytest.mark.parametrize("fault", PLANTS)
def test_a_planted_fault_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch):
    check, arguments, why = PLANTS[fault]
    getattr(faults, fault)(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError), match=why):
        check(*arguments)


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        *{str(case[:2]): case[:2] for case in PLANTS.values()}.values(),
        (chunk, [FLASH]),
        (chunk, [CUDNN]),
        (masked, [CUDNN]),
        (after_torchs_own, ["BSHD"]),
        (after_torchs_own, ["BHSD"]),
    ],
    ids=lambda x: x.__name__ if callable(x) else "-".join(map(str, x)),
)
def test_without_one_the_checks_pass(check: Callable[..., None], arguments: list[Any]):
    check(*arguments)


@pytest.mark.parametrize("backend", [FLASH, CUDNN, EFFICIENT])
def test_what_the_kernels_do_not_write_is_nan(backend: str):
    """The model would not notice a read of it otherwise."""
    q, k, v, _ = inputs()
    engine = {FLASH: "flash", CUDNN: "cudnn", EFFICIENT: "efficient"}[backend]
    if backend == FLASH:
        cu = torch.tensor([0, 5, ROWS - 2], dtype=torch.int32)
        q, k, v = [x[0].transpose(0, 1) for x in (q, k, v)]
        out, lse, _ = autograd.KERNELS["varlen"].forward(Call(q, k, v, None, cu, cu, True, 0.1, max_q=40, max_k=40))
        unwritten = slice(ROWS - 2, None)
        assert lse[..., unwritten].isnan().all()
    else:
        bias = torch.zeros(1, 1, ROWS, ROWS, dtype=BF16)
        bias[:, :, 3] = -math.inf
        out, _, _ = autograd.KERNELS[engine].forward(Call(q, k, v, bias, None, None, False, 0.1))
        unwritten = slice(3, 4)
    assert out[:, :, unwritten].isnan().all()
    assert out.isnan().sum() == out[:, :, unwritten].numel()
