"""Around the call on a GPU: no host synchronisation, CUDA graphs, checkpointing, counted FLOPs, memory."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from sm_flex import flex_attention, scaled_dot_product_attention, stablemask, varlen_attn
from tests.helpers.gpu import DEVICE
from tests.helpers.problems import documents, gamma_of, packed, qkv, unpacked
from tests.helpers.watching import Operations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("one_tile"),
    # What torch says of its own prototypes (synchronisation debugging) and of its compiler.
    pytest.mark.filterwarnings("ignore::Warning:torch"),
]
BF16 = torch.bfloat16
# The inputs that get a gradient, and a call of them.
Case = tuple[list[Tensor], Callable[..., Tensor]]


def leaves(batch: int, rows: int, keys: int, kv_heads: int = 2) -> list[Tensor]:
    return [x.requires_grad_() for x in qkv(batch, 6, kv_heads, rows, keys, 64, BF16, DEVICE)]


def by_backend(backend: str) -> Case:
    mask = stablemask(0.05, length=200)
    call = partial(flex_attention, score_mod=mask, enable_gqa=True, kernel_options={"BACKEND": backend})
    return leaves(2, 131, 131), call


def automatic() -> Case:
    mask = stablemask(0.05, length=200)
    return leaves(2, 131, 131), partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True, score_mod=mask)


def learned() -> Case:
    def call(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=stablemask(gamma, length=200), enable_gqa=True)

    return [*leaves(2, 131, 131), gamma_of(6, BF16, DEVICE).requires_grad_()], call


def through_lse() -> Case:
    mask = stablemask(gamma_of(6, BF16, DEVICE), length=200)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, aux = flex_attention(
            q, k, v, score_mod=mask, enable_gqa=True, kernel_options={"BACKEND": "FLASH_ATTENTION"},
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        assert aux.lse is not None
        return out + aux.lse.unsqueeze(-1).to(out.dtype)

    return leaves(2, 131, 131), call


def decode() -> Case:
    mask = stablemask(0.05, length=200, positions=torch.arange(126, 131, device=DEVICE))
    return leaves(2, 5, 131), partial(flex_attention, score_mod=mask, enable_gqa=True)


def masked() -> Case:
    mask = stablemask(0.05, length=200)
    attn_mask = (torch.rand(2, 1, 131, 131) > 0.3).to(DEVICE)
    return leaves(2, 131, 131, 6), partial(scaled_dot_product_attention, attn_mask=attn_mask, score_mod=mask)


def documents_packed(window: int) -> Case:
    cu, _, _ = documents([3, 0, 81, 1, 46], DEVICE)
    mask = stablemask(0.05, length=200)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        args = (packed(q), packed(k), packed(v), cu, cu, 81, 81)
        return varlen_attn(*args, window_size=(window, 0), enable_gqa=True, score_mod=mask)

    return leaves(1, 131, 131), call


CASES: dict[str, Callable[[], Case]] = {
    "flash": partial(by_backend, "FLASH_ATTENTION"),
    "cudnn": partial(by_backend, "CUDNN_ATTENTION"),
    "efficient": partial(by_backend, "EFFICIENT_ATTENTION"),
    "dense": partial(by_backend, "MATH"),
    "automatic": automatic,
    "learned": learned,
    "through lse": through_lse,
    "decode": decode,
    "masked": masked,
    "packed": partial(documents_packed, -1),
    "packed in windows": partial(documents_packed, 5),
}


@pytest.mark.card("synchronisations of CUDA")
@pytest.mark.parametrize("name", CASES)
def test_no_host_synchronisation(name: str):
    """Once its kernels are built, neither forward nor backward waits for the device."""
    inputs, call = CASES[name]()
    grad_out = torch.randn_like(call(*inputs))
    for _ in range(2):
        torch.autograd.grad(call(*inputs), inputs, grad_out)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            grad_out[0, 0, 0].sum().item()
        torch.autograd.grad(call(*inputs), inputs, grad_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.card("CUDA graphs")
@pytest.mark.parametrize("name", CASES)
def test_cuda_graph(name: str):
    """Forward and backward captured once, replayed on other values."""
    inputs, call = CASES[name]()
    grad_out = torch.randn_like(call(*inputs))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(call(*inputs), inputs, grad_out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*inputs)
        grads = torch.autograd.grad(out, inputs, grad_out)
    for _ in range(2):
        with torch.no_grad():
            for x in (*inputs[:3], grad_out):
                x.copy_(torch.randn_like(x))
            for gamma in inputs[3:]:
                gamma.mul_(0.5)
        graph.replay()
        expected = call(*inputs)
        torch.testing.assert_close(out, expected)
        for a, b in zip(grads, torch.autograd.grad(expected, inputs, grad_out), strict=True):
            torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


# A layer on fp32 rows that one linear map makes q, k and v of, and the op of each engine in it.
MASK = stablemask(0.05, length=64)


def attend(engine: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if engine == "varlen":
        cu = torch.tensor([0, 3, 37], dtype=torch.int32).to(q.device)
        out = varlen_attn(packed(q), packed(k), packed(v), cu, cu, 34, 34, window_size=(-1, 0), score_mod=MASK)
        return unpacked(out)
    return flex_attention(q, k, v, score_mod=MASK, kernel_options={"BACKEND": engine})


OPS = {
    "FLASH_ATTENTION": torch.ops.aten._scaled_dot_product_flash_attention.default,
    "CUDNN_ATTENTION": torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    "EFFICIENT_ATTENTION": torch.ops.aten._scaled_dot_product_efficient_attention.default,
    "varlen": torch.ops.torch_attn._varlen_attn.default,
}


def layer(engine: str, x: Tensor, w: Tensor) -> Tensor:
    q, k, v = (x @ w).to(BF16).unflatten(-1, (3, 4, 64)).permute(2, 0, 3, 1, 4).unbind(0)
    return attend(engine, q, k, v).transpose(1, 2).flatten(2).float() + x


def full(engine: str, x: Tensor, w: Tensor) -> Tensor:
    out = checkpoint(partial(layer, engine), x, w, use_reentrant=False)
    assert isinstance(out, Tensor)
    return out


def save_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in OPS.values() else CheckpointPolicy.PREFER_RECOMPUTE


def selective(engine: str, x: Tensor, w: Tensor) -> Tensor:
    contexts = partial(create_selective_checkpoint_contexts, save_attention)
    out = checkpoint(partial(layer, engine), x, w, use_reentrant=False, context_fn=contexts)
    assert isinstance(out, Tensor)
    return out


def gradients(run: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
    """In x and w of one fixed problem; 37 rows are one tile of every kernel, so that nothing is summed in changing order."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 37, 256, generator=generator).to(DEVICE).requires_grad_()
    w = (torch.randn(256, 768, generator=generator) / 16).to(DEVICE).requires_grad_()
    return torch.autograd.grad((run(x, w) ** 2).sum(), (x, w))


def same_in_bf16(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= torch.finfo(BF16).eps * b.abs().max()


@pytest.mark.parametrize("engine", OPS)
@pytest.mark.parametrize(("run", "calls"), [(layer, 1), (full, 2), (selective, 1)])
def test_checkpoint(engine: str, run: Callable[..., Tensor], calls: int):
    """A saved attention is not run again, and what was saved is not remasked twice."""
    expected = gradients(partial(layer, engine))
    same_in_bf16(gradients(partial(run, engine)), expected)
    with Operations() as operations:
        same_in_bf16(gradients(partial(run, engine)), expected)
    assert operations.ran.count(OPS[engine]) == calls


@pytest.mark.card("the compiler's code for CUDA")
@pytest.mark.parametrize("engine", ["FLASH_ATTENTION", "varlen"])
def test_compiled_selective_checkpoint(engine: str, fresh_compiler: None):
    def run(x: Tensor, w: Tensor) -> Tensor:
        return selective(engine, x, w)

    compiled = torch.compile(run, fullgraph=True)
    same_in_bf16(gradients(compiled), gradients(partial(layer, engine)))
    # A dispatch mode would turn the compiler off; without one an op is recorded once a call.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        gradients(compiled)
    assert Counter(event.name for event in profile.events() or ())[OPS[engine].name()] == 1


KERNELS = [
    (SDPBackend.FLASH_ATTENTION, "FLASH_ATTENTION"),
    (SDPBackend.CUDNN_ATTENTION, "CUDNN_ATTENTION"),
    (SDPBackend.EFFICIENT_ATTENTION, "EFFICIENT_ATTENTION"),
]


@pytest.mark.card("torch's own function takes other ops on a CPU")
@pytest.mark.parametrize(("kernel", "backend"), KERNELS)
def test_flops_are_those_of_torchs_own_causal_call(kernel: SDPBackend, backend: str):
    q, k, v = leaves(2, 131, 131, 6)
    grad_out = torch.randn_like(q)

    def count(call: Callable[..., Tensor]) -> int:
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(call(q, k, v), (q, k, v), grad_out)
        return counter.get_total_flops()

    with sdpa_kernel(kernel):
        expected = count(partial(F.scaled_dot_product_attention, is_causal=True))
    assert count(partial(flex_attention, score_mod=MASK, kernel_options={"BACKEND": backend})) == expected > 0


@pytest.mark.card("CUDA's memory statistics")
@pytest.mark.parametrize(
    ("gamma_is_learned", "ratio"),
    # d gamma multiplies grad_out and out in float32, before the kernel's own buffers are there.
    [(False, 1.05), (True, 1.25)],
)
def test_memory_is_that_of_causal_attention(gamma_is_learned: bool, ratio: float):
    shape = (4, 16, 4096, 64)
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=BF16, requires_grad=True) for _ in range(3))
    grad_out = torch.randn_like(q)
    gamma = torch.linspace(0.01, 0.5, 16, device=DEVICE).requires_grad_(gamma_is_learned)

    def peak(call: Callable[[], Tensor]) -> int:
        torch.autograd.grad(call(), (q, k, v), grad_out)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(call(), (q, k, v, gamma) if uses_gamma else (q, k, v), grad_out)
        return torch.cuda.max_memory_allocated() - before

    uses_gamma = False
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        plain = peak(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    uses_gamma = gamma_is_learned
    mask = stablemask(gamma, length=5000)
    options = {"BACKEND": "FLASH_ATTENTION"}
    assert peak(lambda: flex_attention(q, k, v, score_mod=mask, kernel_options=options)) <= ratio * plain
