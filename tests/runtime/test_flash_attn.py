"""flash-attn's functions under torch.compile, and what can be known of them on CUDA on a machine without a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from sm_flex import headwise_gamma, stablemask
from sm_flex.engines import choose, flex
from sm_flex.epilogue import remask as epilogue_module
from sm_flex.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

H = 4
SLOPES = torch.tensor([0.3, 0.1, 0.0, 0.5])
SINK = torch.linspace(-1, 1, H)
OUTSIDE = stablemask(headwise_gamma(H), length=20)
OPTIONS: dict[str, dict[str, Any]] = {
    "alibi and softcap": {"softcap": 2.0, "alibi_slopes": SLOPES},
    "StableMask, alibi": {"causal": True, "score_mod": OUTSIDE, "alibi_slopes": SLOPES},
}


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def assert_compiles(fn: Callable[..., Tensor], inputs: list[Tensor], backend: str) -> None:
    """One graph, and the numbers and gradients of an eager call."""
    compiled = torch.compile(fn, fullgraph=True, backend=backend)
    expected, ours = fn(*inputs), compiled(*inputs)
    torch.testing.assert_close(ours, expected)
    grad = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(x, inputs, grad) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b)


CALLS: dict[str, dict[str, Any]] = {
    "inductor": {"causal": True, "score_mod": OUTSIDE, "window_size": (3, 0)},
    "aot_eager": {"softcap": 2.0, "alibi_slopes": SLOPES, "learnable_sink": SINK, "window_size": (-1, 4)},
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", CALLS)
def test_a_batch_and_documents_compile_into_one_graph(backend: str) -> None:
    """Queries at the end of their keys: positions, spans and packed rows are made in the graph."""
    cu_q, cu_k = torch.tensor([0, 4, 9]).int(), torch.tensor([0, 6, 11]).int()

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        documents: Any = (q[0], k[0], v[0], cu_q, cu_k, 5, 6)
        return flash_attn_func(q, k, v, **CALLS[backend]) + flash_attn_varlen_func(*documents, **CALLS[backend])

    assert_compiles(both, leaves((2, 9, H, 8), (2, 11, 2, 8), (2, 11, 2, 8)), backend)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("masked", [False, True])
def test_a_decode_step_compiles_and_writes_the_cache(masked: bool) -> None:
    def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, held: Tensor) -> Any:
        options: dict[str, Any] = {"score_mod": OUTSIDE} if masked else {}
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=held, causal=True, **options)

    steps: Any = (step, torch.compile(step, fullgraph=True, backend="aot_eager"))
    q, k, v = torch.randn(2, 1, H, 8), torch.randn(2, 1, 2, 8), torch.randn(2, 1, 2, 8)
    for held in ([3, 5], [4, 4]):
        caches: Any = [torch.ones(2, 2, 9, 2, 8) for _ in range(2)]
        lengths = torch.tensor(held).int()
        expected, ours = (fn(q, *cache, k, v, lengths) for fn, cache in zip(steps, caches, strict=True))
        torch.testing.assert_close(ours, expected)
        assert torch.equal(*caches)
        assert (caches[0] == 1).float().mean() < 1


@pytest.fixture
def flex_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's eager flex, which differentiates on a CPU once its device check is out of the way."""
    import torch.nn.attention.flex_attention as torch_flex

    monkeypatch.setattr(torch_flex, "_validate_device", lambda *args: None)
    real = torch_flex._apply_kernel_options
    monkeypatch.setattr(torch_flex, "_apply_kernel_options", lambda *a, **kw: {**real(*a, **kw), "OUTPUT_LOGSUMEXP": True})
    monkeypatch.setattr(flex, "refuses", lambda need: None)


@pytest.mark.usefixtures("flex_on_a_cpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", ["alibi and softcap", "StableMask, alibi"])
@pytest.mark.parametrize("layout", ["batch", "documents"])
def test_what_torchs_flex_would_run_on_a_gpu(layout: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slopes that differ by sequence, a window, documents: as spans in a BlockMask, against the same in plain PyTorch."""
    inputs = leaves((2, 9, H, 8), (2, 11, 2, 8), (2, 11, 2, 8))
    options = {**OPTIONS[name], "alibi_slopes": torch.stack([SLOPES, SLOPES.flip(0)]), "window_size": (4, 1)}
    if "score_mod" in options:
        options["window_size"] = (4, 0)
    cu_q, cu_k = torch.tensor([0, 4, 9]).int(), torch.tensor([0, 6, 11]).int()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layout == "batch":
            return flash_attn_func(q, k, v, **options)
        return flash_attn_varlen_func(q[0], k[0], v[0], cu_q, cu_k, 5, 6, **options)

    ours = run(*inputs)
    monkeypatch.setattr(choose, "candidates", lambda need: ["dense"])
    expected = run(*inputs)
    torch.testing.assert_close(ours, expected)
    grad = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(x, inputs, grad) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build of torch knows no CUDA device, not even a fake one")
def test_no_value_of_a_gpus_tensor_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake tensor has no values: whoever asks for one raises."""
    monkeypatch.setattr(epilogue_module, "kernel", None)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *a, **kw: SDPBackend.EFFICIENT_ATTENTION.value)
    with FakeTensorMode(), torch.no_grad():

        def fake(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(shape, device="cuda", dtype=dtype)

        q, k, v, k_cache = fake(2, 1, H, 64), fake(2, 1, 2, 64), fake(2, 1, 2, 64), fake(2, 16, 2, 64)
        held, cu = fake(2, dtype=torch.int32), fake(3, dtype=torch.int32)
        mask = stablemask(fake(H, dtype=torch.float32), length=20, sink=fake(H, dtype=torch.float32))
        cases: list[dict[str, Any]] = [{}, {"score_mod": mask}, {"learnable_sink": fake(H)}]
        for options in cases:
            step: Any = {"causal": True, "cache_seqlens": held, "cache_leftpad": held, "cache_batch_idx": held, **options}
            result: Any = flash_attn_with_kvcache(q, k_cache, k_cache, k, v, return_softmax_lse=True, **step)
            out, lse = result
            assert (out.shape, out.device.type, lse.shape) == (q.shape, "cuda", (2, H, 1))
            rows = fake(2, 16, H, 64)
            assert flash_attn_func(rows, k_cache, k_cache, causal=True, window_size=(3, 0), **options).shape == rows.shape
            both = {**options, "window_size": (3, 2 if "score_mod" not in options else 0), "causal": "score_mod" in options}
            assert flash_attn_func(rows, k_cache, k_cache, **both).shape == rows.shape
            packed = flash_attn_varlen_func(fake(9, H, 64), fake(9, 2, 64), fake(9, 2, 64), cu, cu, 5, 5, causal=True, **options)
            assert packed.shape == (9, H, 64)
        with pytest.raises(NotImplementedError, match=r"deterministic .* torch.use_deterministic_algorithms\(True\)"):
            flash_attn_func(q, k, v, deterministic=True)
