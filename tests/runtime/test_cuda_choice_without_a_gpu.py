"""Which engine serves a call on CUDA, as far as a machine without a GPU can know."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from sm_flex.engines import Need, choose, efficient, torch_choice
from sm_flex.mass.table import Mass
from sm_flex.runtime import HAS_TRITON
from sm_flex.score_mod import stablemask

CUDA = "cuda"
fake_cuda = pytest.mark.skipif(
    torch.version.cuda is None, reason="a CPU build of torch knows no CUDA device, not even a fake one"
)


def fake(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device=CUDA, dtype=dtype)


def chosen(monkeypatch: pytest.MonkeyPatch, torchs: SDPBackend, need: dict, **kwargs) -> str:
    """The rule's answer on CUDA where torch's own choice is the given backend."""
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *a, **kw: torchs.value)
    with FakeTensorMode():
        q = fake(2, 4, kwargs.pop("rows", 16), kwargs.pop("dim", 64), dtype=kwargs.pop("dtype", torch.bfloat16))
        k = fake(2, 4, 16, q.shape[-1], dtype=q.dtype)
        mask = fake(1, 1, 16, 16) if kwargs.pop("masked", False) else None
        if mask is not None and kwargs.pop("mask_grad", False):
            mask.requires_grad_()
        return choose.choose(Need(q, k, k, mask, **need, **kwargs))


@fake_cuda
@pytest.mark.parametrize(
    ("backend", "need", "kwargs", "engine"),
    [
        (SDPBackend.FLASH_ATTENTION, {}, {}, "flash"),
        (SDPBackend.CUDNN_ATTENTION, {}, {}, "cudnn"),
        (SDPBackend.EFFICIENT_ATTENTION, {}, {"masked": True}, "efficient"),
        (SDPBackend.MATH, {}, {"dtype": torch.float64}, "dense"),
        (SDPBackend.CUDNN_ATTENTION, {}, {"masked": True, "mask_grad": True}, "dense"),
        (SDPBackend.CUDNN_ATTENTION, {"lse_grad": True}, {"dim": 128}, "flash"),
        (SDPBackend.CUDNN_ATTENTION, {"lse_grad": True}, {"dim": 64}, "cudnn"),
        (SDPBackend.FLASH_ATTENTION, {"lse_grad": True}, {"dim": 256}, "dense"),
        (SDPBackend.EFFICIENT_ATTENTION, {"lse_grad": True}, {"dim": 256}, "efficient"),
        (SDPBackend.FLASH_ATTENTION, {"score_mod": True}, {}, "flex"),
        (SDPBackend.FLASH_ATTENTION, {"block_mask": True}, {}, "flex"),
        (SDPBackend.FLASH_ATTENTION, {"score_mod": True}, {"masked": True}, "dense"),
        (SDPBackend.FLASH_ATTENTION, {"score_mod": True}, {"dtype": torch.float64}, "dense"),
        (SDPBackend.FLASH_ATTENTION, {"score_mod": True, "dropout_p": 0.1}, {}, "dense"),
        (SDPBackend.FLASH_ATTENTION, {"flex_options": True}, {}, "flex"),
        (SDPBackend.FLASH_ATTENTION, {}, {"rows": 5}, "flash"),
        (SDPBackend.FLASH_ATTENTION, {}, {"backend": "TRITON"}, "flex"),
        (SDPBackend.FLASH_ATTENTION, {}, {"backend": "MATH"}, "dense"),
    ],
)
def test_who_serves(backend: SDPBackend, need: dict, kwargs: dict, engine: str, monkeypatch: pytest.MonkeyPatch):
    assert chosen(monkeypatch, backend, need, **kwargs) == engine


@fake_cuda
@pytest.mark.parametrize(("impl", "major", "widest"), [(None, 10, 248), ("FA3", 9, 248), ("FA4", 9, 248), ("FA4", 10, 120)])
def test_a_gradient_of_lse_stays_within_the_head_dims_of_the_active_flash_attention(
    impl: str | None, major: int, widest: int, monkeypatch: pytest.MonkeyPatch
):
    """It widens 128 to 136, which FA4's kernels for compute capability 10 refuse."""
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: impl)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    for dim in (widest, widest + 8):
        engine = "flash" if dim == widest else "dense"
        assert chosen(monkeypatch, SDPBackend.FLASH_ATTENTION, {"lse_grad": True}, dim=dim) == engine
        assert chosen(monkeypatch, SDPBackend.FLASH_ATTENTION, {}, dim=dim) == "flash"
        with FakeTensorMode():
            q = fake(7, 4, dim)
            need = Need(q, q, q, packed=True)
            assert choose.choose(need) == "varlen"
            assert choose.choose(need._replace(lse_grad=True)) == ("varlen" if dim == widest else "dense")


@fake_cuda
def test_torchs_choice_is_asked_for_what_will_run(monkeypatch: pytest.MonkeyPatch):
    """Square: is_causal. A chunk against a cache: flash's own alignment first, then a mask. A single query: no mask."""
    asked = []

    def choice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, causal: bool, **kw: object) -> int:
        asked.append((q.shape[2], None if mask is None else tuple(mask.shape), causal))
        return SDPBackend.EFFICIENT_ATTENTION.value

    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    monkeypatch.setattr(torch_choice, "can_use", lambda *args: False)
    with FakeTensorMode():
        k = fake(2, 4, 16, 64)
        for rows in (16, 5, 1):
            assert choose.choose(Need(fake(2, 4, rows, 64), k, k)) == "efficient"
            assert (efficient.causality(None, fake(2, 4, rows, 64), k)[0] is not None) == (rows == 5)
        assert asked == [(16, None, True), (5, (1, 1, 5, 16), False), (1, None, False)]
        monkeypatch.setattr(torch_choice, "can_use", lambda engine, *args: engine == "flash")
        assert choose.choose(Need(fake(2, 4, 5, 64), k, k)) == "flash"
        assert len(asked) == 3


@fake_cuda
@pytest.mark.parametrize(
    ("device", "dtype", "dim", "engine"),
    [
        ("cuda", torch.bfloat16, 64, "varlen"),
        ("cuda", torch.float32, 64, "dense"),
        ("cuda", torch.bfloat16, 256, "varlen"),
        ("cuda", torch.bfloat16, 264, "dense"),
        ("cpu", torch.float64, 264, "varlen_cpu"),
        ("meta", torch.float32, 64, "dense"),
    ],
)
def test_who_serves_packed_documents(device: str, dtype: torch.dtype, dim: int, engine: str):
    with FakeTensorMode():
        q = torch.empty(7, 4, dim, device=device, dtype=dtype)
        assert choose.choose(Need(q, q, q, packed=True)) == engine
        assert choose.choose(Need(q, q, q, packed=True, lse_grad=True)) == ("dense" if dim > 248 and device == CUDA else engine)


@fake_cuda
@pytest.mark.skipif(not HAS_TRITON, reason="without Triton log M is always a table")
def test_who_computes_log_mass():
    """The kernel itself where it can; a table where gamma is learned, beside a sink, in float64 and elsewhere."""
    device, cu = torch.device(CUDA), torch.tensor([0, 3, 7], dtype=torch.int32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        gamma = torch.empty(4, device=CUDA)
        mass = stablemask(gamma, length=9).mass(device, 7, 7, torch.float32, cu)
        assert mass == Mass(None, gamma, None, cu, 9)
        positions = torch.empty(7, device=CUDA, dtype=torch.int64)
        mass = stablemask(0.5, length=9, positions=positions).mass(device, 7, 7, torch.float32, cu)
        assert (mass.log_mass_HS, mass.cu_seqlens, mass.length) == (None, None, 9)
        assert mass.positions is positions
        learned = torch.empty(4, device=CUDA, requires_grad=True)
        for mask, dtype in (
            (stablemask(learned, length=9), torch.float32),
            (stablemask(gamma, length=9, sink=gamma), torch.float32),
            (stablemask(gamma, length=9), torch.float64),
        ):
            mass = mask.mass(device, 7, 7, dtype)
            assert mass == Mass(mass.log_mass_HS)
            assert mass.log_mass_HS is not None
            assert (mass.log_mass_HS.shape, mass.log_mass_HS.dtype) == ((4, 7), dtype)
        with torch.no_grad():
            assert stablemask(learned, length=9).mass(device, 7, 7, torch.float32).log_mass_HS is None
    assert stablemask(torch.rand(4), length=9).mass(torch.device("cpu"), 7, 7, torch.float32).log_mass_HS is not None


@fake_cuda
@pytest.mark.parametrize(
    ("need", "why"),
    [
        ({"backend": "FLASH_ATTENTION", "masked": True}, "it takes no attn_mask"),
        ({"backend": "CUDNN_ATTENTION", "dim": 128, "lse_grad": True}, "head dims up to 120"),
        ({"backend": "EFFICIENT_ATTENTION", "score_mod": True}, "neither an inner score_mod nor a block_mask"),
        ({"backend": "EFFICIENT_ATTENTION", "rows": 0}, "it takes no empty tensor"),
        ({"backend": "MATH", "flex_options": True}, "belong to torch's flex kernels"),
        ({"backend": "TRITON", "masked": True}, "it takes no attn_mask"),
        ({"backend": "TRITON", "dropout_p": 0.1}, "it has no dropout"),
    ],
)
def test_an_engine_asked_for_by_name_says_why_it_cannot_serve(need: dict, why: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(NotImplementedError, match=f"BACKEND {need['backend']} cannot serve this call: .*{why}"):
        chosen(monkeypatch, SDPBackend.MATH, {}, **need)
