"""flash-attn's functions on a GPU, against its documented semantics, and against flash-attn itself where it is installed."""

from typing import Any

import pytest
import torch
from torch import Tensor

import sm_flex.flash_attn as ours
from sm_flex import headwise_gamma, stablemask
from sm_flex.testing import assert_within_error_budget
from tests.helpers.flash_attn import reference
from tests.helpers.gpu import DEVICE, HALF, name_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("one_tile"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]
H, KV, D = 6, 2, 64
SLOPES, SINK = torch.tensor([0.3, 0.1, 0.0, 0.5, 0.2, 0.05]), torch.linspace(-1, 2, H)
EQ11 = {"gamma": headwise_gamma(H).double(), "length": 150, "positions": None}
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (40, 7)},
    "causal window": {"causal": True, "window_size": (40, -1)},
    "softcap": {"causal": True, "softcap": 2.0},
    "alibi": {"alibi_slopes": SLOPES, "window_size": (40, 7)},
    "sink": {"causal": True, "learnable_sink": SINK},
    "StableMask": {"causal": True, "stablemask": EQ11},
    "StableMask, window": {"causal": True, "window_size": (40, 0), "stablemask": EQ11},
    "StableMask, alibi": {"causal": True, "alibi_slopes": SLOPES, "stablemask": EQ11},
}
FLEX = pytest.mark.card("torch's flex_attention does not train on a CPU")
TRAINED = [pytest.param(name, marks=FLEX if {"softcap", "alibi_slopes"} & set(OPTIONS[name]) else ()) for name in OPTIONS]


def on_device(options: dict[str, Any]) -> dict[str, Any]:
    """The reference's options as sm_flex takes them."""
    found = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items() if name != "stablemask"}
    return found | ({"score_mod": stablemask(headwise_gamma(H).to(DEVICE), length=150)} if "stablemask" in options else {})


def expected_of(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    if "stablemask" in options:
        positions = (torch.arange(len(q)) + len(k) - len(q)).clamp(min=0)
        options = {**options, "stablemask": {**EQ11, "positions": positions}}
    return reference(q, k, v, **options)[0]


def leaves(rows: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(n, heads, D).to(dtype).requires_grad_() for n, heads in ((rows, H), (keys, KV), (keys, KV))]


def assert_right(out: Tensor, inputs: list[Tensor], parts: list[list[Tensor]], options: dict[str, Any]) -> None:
    """out (T, H, D) and its gradients against the sequences one by one, in float64 and in the same dtype."""
    grad = torch.randn_like(out)
    results = [[out, *torch.autograd.grad(out, inputs, grad)]]
    for dtype in (torch.float64, out.dtype):
        copies = [[x.detach().cpu().to(dtype).requires_grad_() for x in part] for part in parts]
        each = torch.cat([expected_of(q, k, v, options) for q, k, v in copies])
        flat = torch.autograd.grad(each, [x for part in copies for x in part], grad.cpu().to(each.dtype))
        results.append([each, *(torch.cat(flat[n::3]) for n in range(3))])
    for actual, expected, plain in zip(*results, strict=True):
        assert_within_error_budget(actual.cpu(), expected, plain)


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
@pytest.mark.parametrize(("rows", "keys"), [(130, 130), (70, 130), (1, 130)])
@pytest.mark.parametrize("name", TRAINED)
def test_flash_attn_func(name: str, rows: int, keys: int, dtype: torch.dtype) -> None:
    inputs = [x.detach().to(DEVICE).requires_grad_() for x in leaves(rows, keys, dtype)]
    q, k, v = inputs
    out = ours.flash_attn_func(q[None], k[None], v[None], **on_device(OPTIONS[name]))[0]
    assert_right(out, inputs, [inputs], OPTIONS[name])


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("lengths", [([40, 0, 90], [40, 0, 90]), ([10, 7, 90], [40, 3, 90])], ids=["square", "chunks"])
def test_flash_attn_varlen_func(lengths: tuple[list[int], list[int]], name: str) -> None:
    rows, keys = lengths
    inputs = [x.detach().to(DEVICE).requires_grad_() for x in leaves(sum(rows), sum(keys), torch.bfloat16)]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int().to(DEVICE) for x in lengths)
    out = ours.flash_attn_varlen_func(*inputs, cu_q, cu_k, 90, 90, **on_device(OPTIONS[name]))  # pyright: ignore
    pieces = [x.split(n) for x, n in zip(inputs, (rows, keys, keys), strict=True)]
    assert_right(out, inputs, [list(part) for part in zip(*pieces, strict=True)], OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("new", [1, 5])
def test_flash_attn_with_kvcache(new: int, name: str) -> None:
    """Lengths that differ, on the GPU, where they are not looked at."""
    held = [0, 31, 120]
    q, k, v = (torch.randn(3, new, heads, D).bfloat16() for heads in (H, KV, KV))
    caches = [torch.randn(3, 130, KV, D).bfloat16().to(DEVICE) for _ in range(2)]
    moved = [x.to(DEVICE) for x in (q, k, v)]
    lengths = torch.tensor(held).int().to(DEVICE)
    with torch.no_grad():
        out = ours.flash_attn_with_kvcache(moved[0], *caches, *moved[1:], cache_seqlens=lengths, **on_device(OPTIONS[name]))  # pyright: ignore
    assert isinstance(out, Tensor)
    for n, start in enumerate(held):
        assert torch.equal(caches[0][n, start : start + new].cpu(), k[n])
        part: Any = [q[n], *(cache[n, : start + new].cpu() for cache in caches)]
        expected, plain = (expected_of(*(x.to(dtype) for x in part), options=OPTIONS[name]) for dtype in (torch.float64, q.dtype))
        assert_within_error_budget(out[n].cpu(), expected, plain)


@pytest.mark.parametrize("name", [name for name in OPTIONS if "StableMask" not in name and name != "sink"])
def test_flash_attn_itself_says_the_same(name: str) -> None:
    theirs = pytest.importorskip("flash_attn")
    q, k, v = (x.detach().to(DEVICE)[None] for x in leaves(70, 130, torch.bfloat16))
    options = on_device(OPTIONS[name])
    results = [module.flash_attn_func(q, k, v, **options) for module in (ours, theirs)]
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
