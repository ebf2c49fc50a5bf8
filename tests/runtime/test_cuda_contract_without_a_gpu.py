"""What the CUDA ops are given, on fake CUDA tensors: every drop-in, forward and backward, against the ops' contract."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.nn.attention.flex_attention import AuxRequest

from sm_flex import flex_attention, scaled_dot_product_attention, stablemask, varlen_attn
from tests.helpers.cuda_model import faults, installed
from tests.helpers.cuda_model.spy import watched_steps

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason="a CPU build of torch knows no CUDA device, not even a fake one"
)
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
BF16 = torch.bfloat16


def fake(*shape: int, dtype: torch.dtype = BF16, grad: bool = True) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype, requires_grad=grad)


# Where (B, H, S, D) tensors lie: as they are, as a projection leaves them, and as a part of a wider one.
LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "BHSD": lambda b, h, s, d, dtype: fake(b, h, s, d, dtype=dtype),
    "BSHD": lambda b, h, s, d, dtype: fake(b, s, h, d, dtype=dtype).transpose(1, 2),
    "wide": lambda b, h, s, d, dtype: fake(b, s, h, 3 * d, dtype=dtype)[..., d : 2 * d].transpose(1, 2),
}
# And the gradient of out: dense, transposed, and broadcast as the gradient of a sum is.
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "broadcast": lambda x: x.new_empty(()).expand(x.shape),
}


def dense_step(
    engine: str,
    queries: int = 37,
    keys: int = 37,
    dim: int = 64,
    kv_heads: int = 3,
    mask: str | None = None,
    lse_grad: bool = False,
    dtype: torch.dtype = BF16,
    layout: str = "BSHD",
    gradient: str = "transposed",
    learned: bool = True,
) -> list[str]:
    """The ops that a training step of the engine ran, each of them held to its contract."""
    with watched_steps() as (spy, steps):
        made = LAYOUTS[layout]
        q, k, v = made(2, 6, queries, dim, dtype), made(2, kv_heads, keys, dim, dtype), made(2, kv_heads, keys, dim, dtype)
        positions = torch.empty(queries, device="cuda", dtype=torch.int64)
        score_mod = stablemask(fake(6, dtype=torch.float32, grad=learned), length=80, positions=positions)
        options: Any = {"score_mod": score_mod, "enable_gqa": kv_heads != 6}
        if mask is None:
            options |= {"kernel_options": {"BACKEND": BACKENDS[engine].name}}
            flex_attention(q, k, v, return_aux=AuxRequest(lse=lse_grad), **options)
        else:
            shape = (1, 1, queries, keys)
            attn_mask = fake(*shape, dtype=torch.bool, grad=False) if mask == "bool" else fake(*shape, dtype=dtype)
            with sdpa_kernel(BACKENDS[engine]):
                scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)
        (step,) = steps
        step.backward(GRADIENTS[gradient], lse_grad)
    return spy.called


def ops_of(engine: str) -> list[str]:
    return [f"_scaled_dot_product_{engine}_attention", f"_scaled_dot_product_{engine}_attention_backward"]


CASES: dict[str, dict[str, Any]] = {
    "square": {},
    "one query": {"queries": 1},
    "chunk against a cache": {"queries": 5},
    "more queries than keys": {"queries": 70},
    "heads for themselves": {"kv_heads": 6},
    "one key head": {"kv_heads": 1},
    "narrow": {"dim": 40},
    "gamma is not learned": {"learned": False},
    "dense gradient": {"gradient": "dense"},
    "broadcast gradient": {"gradient": "broadcast"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lse_grad", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("engine", BACKENDS)
def test_causal(engine: str, lse_grad: bool, layout: str):
    for case in CASES.values():
        assert dense_step(engine, lse_grad=lse_grad, layout=layout, **case) == ops_of(engine)


@pytest.mark.parametrize("lse_grad", [False, True])
def test_flash_pads_a_head_dim_of_60(lse_grad: bool):
    assert dense_step("flash", dim=60, lse_grad=lse_grad) == ops_of("flash")


@pytest.mark.parametrize("lse_grad", [False, True])
def test_efficient_in_float32(lse_grad: bool):
    assert dense_step("efficient", dtype=torch.float32, lse_grad=lse_grad) == ops_of("efficient")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("queries", [37, 5, 70])
@pytest.mark.parametrize(("engine", "mask"), [("cudnn", "bool"), ("efficient", "bool"), ("efficient", "float")])
def test_masked(engine: str, mask: str, queries: int, layout: str):
    kv_heads = 6 if engine == "efficient" else 3  # torch gives the memory-efficient kernel no grouped heads
    for gradient in GRADIENTS:
        step = dense_step(engine, queries, kv_heads=kv_heads, mask=mask, layout=layout, gradient=gradient)
        assert step == ops_of(engine)


@pytest.mark.parametrize("dim", [64, 60])
@pytest.mark.parametrize("window", [-1, 5])
@pytest.mark.parametrize("lse_grad", [False, True])
def test_packed(dim: int, window: int, lse_grad: bool):
    with watched_steps() as (spy, steps):
        q, k, v = fake(37, 6, dim), fake(41, 3, dim), fake(41, 3, dim)
        cu_q, cu_k = [torch.empty(4, device="cuda", dtype=torch.int32) for _ in range(2)]
        positions = torch.empty(37, device="cuda", dtype=torch.int64)
        mask = stablemask(fake(6, dtype=torch.float32), length=80, positions=positions)
        varlen_attn(
            q, k, v, cu_q, cu_k, 20, 30, window_size=(window, 0), enable_gqa=True,
            return_aux=varlen.AuxRequest(lse=lse_grad), score_mod=mask,
        )  # fmt: skip
        (step,) = steps
        for gradient in ("dense", "transposed", "broadcast"):
            spy.called.clear()
            step.backward(GRADIENTS[gradient], lse_grad)
            assert spy.called == ["_varlen_attn_backward"]


@pytest.mark.parametrize(
    ("fault", "case", "why"),
    [
        ("out_in_bhsd_memory", {"engine": "efficient"}, "out lies in .B, S, H, D. memory"),
        ("unpadded_lse", {"engine": "efficient"}, "lse padded to 32 rows"),
        ("heads_not_repeated", {"engine": "efficient"}, "as many heads as q"),
        ("heads_left_repeated", {"engine": "efficient"}, "a gradient is .2, 6"),
        ("bias_not_aligned", {"engine": "efficient", "queries": 5}, "attn_bias has strides"),
        ("statistics_of_three_dimensions", {"engine": "cudnn"}, "cudnn: lse"),
        ("statistics_of_other_strides", {"engine": "cudnn"}, "cudnn: contiguous lse"),
        ("cudnn_out_in_bhsd_memory", {"engine": "cudnn"}, "out lies as its forward left it"),
        ("head_dim_not_padded", {"engine": "flash", "dim": 60}, "a multiple of 8 up to 256"),
        ("state_swapped", {"engine": "flash"}, "philox_seed is the rng_state"),
    ],
)
def test_a_planted_fault_is_noticed(fault: str, case: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch):
    getattr(faults, fault)(monkeypatch)
    with pytest.raises(AssertionError, match=why):
        dense_step(**case)


def test_nothing_of_the_model_stays():
    q = torch.randn(1, 2, 5, 8)
    call: Any = {"score_mod": stablemask(0.1), "kernel_options": {"BACKEND": "EFFICIENT_ATTENTION"}}
    with installed():
        flex_attention(q, q, q, **call)
    with pytest.raises(NotImplementedError, match="FLASH_ATTENTION and MATH are the only ones"):
        flex_attention(q, q, q, **call)
    with pytest.raises(NotImplementedError):
        torch.ops.aten._scaled_dot_product_efficient_attention(q, q, q, None, True)
