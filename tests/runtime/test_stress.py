"""Used hard: by threads, by two processes, compiled for hundreds of shapes, saved, copied, exported, transformed."""

import copy
import gc
import io
import pickle
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from sm_flex import flex_attention, headwise_gamma, remask, scaled_dot_product_attention, stablemask, varlen_attn
from sm_flex.testing import oracle
from tests.helpers.problems import leaves

HEADS, LENGTH = 4, 64


def rows(length: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return leaves(2, HEADS, length, 8, dtype=dtype, seed=seed)


class Layer(nn.Module):
    """An attention layer with a learned gamma per head, and a fixed StableMask beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.raw_gamma = nn.Parameter(torch.zeros(HEADS))
        self.fixed = stablemask(headwise_gamma(HEADS), length=LENGTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = [y.unflatten(-1, (HEADS, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)]
        out = flex_attention(q, k, v, score_mod=stablemask(softplus(self.raw_gamma), length=LENGTH))
        out = out + scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=self.fixed)  # pyright: ignore
        return self.out(out.transpose(1, 2).flatten(2))


def layer(seed: int = 0) -> Layer:
    torch.manual_seed(seed)
    return Layer()


def by_flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, score_mod=stablemask(0.3, length=LENGTH))  # pyright: ignore[reportReturnType]


def by_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = stablemask(0.3, length=LENGTH, score_mod=lambda s, b, h, i, j: s - 0.1 * (i - j))
    return flex_attention(q, k, v, score_mod=mask)  # pyright: ignore[reportReturnType]


def by_varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    length = q.shape[2]
    cu = torch.tensor([0, length, 2 * length]).int()
    out = varlen_attn(*packed[:3], cu, cu, length, length, window_size=(-1, 0), score_mod=stablemask(0.3, length=LENGTH))  # pyright: ignore
    return out.unflatten(0, (2, length)).transpose(1, 2)  # pyright: ignore[reportAttributeAccessIssue]


WAYS = [by_flex, by_dense, by_varlen]


def trained(fn: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = fn(*inputs)
    return [out.detach(), *torch.autograd.grad(out.cos().sum(), inputs)]


@pytest.mark.parametrize("fn", WAYS)
def test_threads_calling_at_once(fn: Callable[..., Tensor]):
    """Forty calls of eight shapes over eight threads: bit for bit what one thread gives."""
    problems = [rows(9 + i % 8, seed=i) for i in range(40)]
    alone = [trained(fn, inputs) for inputs in problems]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda inputs: trained(fn, inputs), problems))
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("fn", WAYS)
def test_deterministic_mode_gives_equal_bits(fn: Callable[..., Tensor]):
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (trained(fn, rows(33)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _rank(rank: int, folder: str) -> None:
    """Two steps of data-parallel training; each rank leaves its gradients and weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(layer())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(batch(step)[rank::2]).square().mean().backward()
        optimizer.step()
    torch.save([(p.detach(), p.grad) for p in model.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def batch(step: int) -> Tensor:
    return torch.randn(4, 17, 32, generator=torch.Generator().manual_seed(step))


def test_data_parallel_on_two_processes(tmp_path: Path):
    """Two ranks with half the batch each are one process with all of it, the learned gamma included."""
    spawn(_rank, (str(tmp_path),), nprocs=2)
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
    assert model.raw_gamma.grad is not None
    assert model.raw_gamma.grad.abs().min() > 0
    for rank in range(2):
        for p, (weight, grad) in zip(model.parameters(), torch.load(tmp_path / f"{rank}.pt"), strict=True):
            torch.testing.assert_close(weight, p.detach())
            torch.testing.assert_close(grad, p.grad)


@pytest.mark.parametrize(("fn", "calls"), [(by_flex, 200), (by_varlen, 200), (by_dense, 30)])
def test_hundreds_of_shapes_compile_a_few_times(fn: Callable[..., Tensor], calls: int, fresh_compiler: None):
    """fullgraph, and an error at the recompile limit: no call falls back, and lengths soon are dynamic."""
    before = counters["stats"]["unique_graphs"]
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for call in range(calls):
            inputs = [x.detach() for x in rows(2 + call * 37 % 61, seed=call)]
            torch.testing.assert_close(compiled(*inputs), fn(*inputs))
    assert counters["stats"]["unique_graphs"] - before <= 3


def test_save_and_resume_under_checkpointing():
    """Four steps in one go, and two, saved, loaded into a new model, and two more: the same weights, bit for bit."""

    def steps(model: Layer, optimizer: torch.optim.Optimizer, which: range) -> None:
        for step in which:
            optimizer.zero_grad()
            out = checkpoint(model, batch(step), use_reentrant=False)
            out.square().mean().backward()  # pyright: ignore
            optimizer.step()

    whole = layer()
    steps(whole, torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9), range(4))
    first = layer()
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9)
    steps(first, optimizer, range(2))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    second = layer(seed=1)
    second.load_state_dict(saved["model"])
    optimizer = torch.optim.SGD(second.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(saved["optimizer"])
    steps(second, optimizer, range(2, 4))
    for a, b in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("fn", "count"), [(by_flex, 1000), (by_varlen, 1000), (by_dense, 200)])
def test_no_memory_is_kept_over_a_thousand_calls(fn: Callable[..., Tensor], count: int):
    """What is alive, and the most that the process ever held, after a hundred training calls and after many more."""

    def held() -> tuple[int, int, int]:
        gc.collect()
        objects = gc.get_objects()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB
        return sum(issubclass(type(x), Tensor) for x in objects), len(objects), peak

    def calls(first: int, end: int) -> None:
        for call in range(first, end):
            trained(fn, rows(1 + call % 19))

    calls(0, 100)
    tensors, objects, peak = held()
    calls(100, 100 + count)
    later = held()
    assert later[0] <= tensors  # fewer where what earlier tests left was collected
    assert later[1] - objects < count // 2  # one kept by every other call
    assert later[2] - peak < 16 * 1024


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_mask_and_of_a_model_attend_alike(copied: Callable[[Any], Any]):
    q, k, v = (x.detach() for x in rows(17))
    mask = stablemask(headwise_gamma(HEADS), length=LENGTH, positions=torch.arange(17))
    again = copied(mask)
    assert again is not mask
    assert torch.equal(flex_attention(q, k, v, score_mod=again), flex_attention(q, k, v, score_mod=mask))  # pyright: ignore
    model, x = layer(), batch(0)
    expected = model(x)
    assert torch.equal(copied(model)(x), expected)


def test_a_deep_copy_learns_alone():
    gamma = torch.tensor(0.3, requires_grad=True)
    again = copy.deepcopy(stablemask(gamma, length=LENGTH))
    assert again.gamma is not gamma
    assert again.gamma.requires_grad
    q, k, v = rows(5)
    flex_attention(q, k, v, score_mod=again).sum().backward()  # pyright: ignore
    assert again.gamma.grad is not None
    assert gamma.grad is None


class Eager(nn.Module):
    """One of the WAYS as a module."""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.fn(q, k, v)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("fn", WAYS)
def test_export(fn: Callable[..., Tensor]):
    """Exported with a dynamic length, and run at others than it was exported at."""
    lengths = {2: torch.export.Dim("length", min=2, max=60)}
    program = torch.export.export(Eager(fn), tuple(x.detach() for x in rows(9)), dynamic_shapes=dict.fromkeys("qkv", lengths))
    for length in (9, 5, 41):
        inputs = [x.detach() for x in rows(length)]
        torch.testing.assert_close(program.module()(*inputs), fn(*inputs))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_export_of_a_model():
    model, x = layer(), batch(0)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "vmap": lambda fn, *x: torch.vmap(fn)(*(y.unsqueeze(0) for y in x)),
    "grad": lambda fn, *x: torch.func.grad(lambda q: fn(q, *x[1:]).sum())(x[0]),
    "vjp": lambda fn, *x: torch.func.vjp(fn, *x),
    "jvp": lambda fn, *x: torch.func.jvp(fn, x, x),
    "jacrev": lambda fn, *x: torch.func.jacrev(fn)(*x),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("fn", WAYS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_is_refused(fn: Callable[..., Tensor], transform: str):
    with pytest.raises(NotImplementedError, match=r"torch\.func .* use torch\.autograd"):
        TRANSFORMS[transform](fn, *(x.detach() for x in rows(5)))


def test_torch_func_over_a_learned_gamma_and_over_remask_is_refused():
    q, k, v = (x.detach() for x in rows(5))
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda g: flex_attention(q, k, v, score_mod=stablemask(g)).sum())(torch.tensor(0.3))  # pyright: ignore
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.vmap(remask)(torch.ones(2, 5, 4), torch.ones(2, 5), torch.ones(2, 5))


@pytest.mark.parametrize("fn", WAYS)
def test_forward_mode_is_refused(fn: Callable[..., Tensor]):
    import torch.autograd.forward_ad as forward_ad

    q, k, v = (x.detach() for x in rows(5))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        fn(forward_ad.make_dual(q, q), k, v)


def test_second_derivatives_are_right_or_refused():
    """The dense engine has them, against the oracle; the library kernels say that they have none."""

    def second(fn: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(fn(*inputs).sin().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(first.sin().sum(), inputs)

    inputs = rows(5, dtype=torch.float64)
    ours = second(by_dense, inputs)
    distance = torch.arange(5).unsqueeze(1) - torch.arange(5)
    expected = second(lambda q, k, v: oracle(q, k, v, gamma=0.3, length=LENGTH, bias=-0.1 * distance)[0], inputs)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    for fn in (by_flex, by_varlen):
        with pytest.raises(RuntimeError, match=r"is not implemented|no autograd formula"):
            second(fn, inputs)
