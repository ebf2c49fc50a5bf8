"""torch.compile for an H100 that exists on paper: fake CUDA tensors go in, Inductor's code comes out, nothing runs.

C++ asks the CUDA runtime for the device and its streams, Python asks torch.cuda. The first is answered by two
small libraries put in front of the real ones (libraries() builds them, child() is the environment they want),
the second by patches. Each compiled graph answers a call with the fake outputs of its FX graph.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from sm_flex.runtime import BEFORE_2_14

HERE = Path(__file__).parent
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 on paper", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, total_memory=80 << 30,
    L2_cache_size=50 << 20, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472, gcnArchName="", is_integrated=False, uuid="0",
)  # fmt: skip


def why_not() -> str | None:
    """Why this machine cannot do it, or None."""
    if torch.version.cuda is None:
        return "this torch is a CPU build, which knows no CUDA device, not even one on paper"
    if BEFORE_2_14:
        return "it patches the Inductor of torch 2.14"
    if shutil.which("gcc") is None:
        return "gcc is missing, which builds the CUDA runtime on paper"
    return None


def child(folder: Path) -> dict[str, str]:
    """The environment of a process that has such a GPU. folder keeps the two libraries."""
    for source, target in (("cudart.c", "libcudart_on_paper.so"), ("cuda.c", "libcuda.so.1")):
        subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", folder / target, HERE / source], check=True)
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    return env | {
        "LD_PRELOAD": str(folder / "libcudart_on_paper.so"),
        "LD_LIBRARY_PATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }


class Graph(NamedTuple):
    """A compiled graph: Inductor's code, and the size of each output, in elements."""

    code: str
    outputs: list[int]


def compile_step(fn: Callable[..., Tensor], make_inputs: Callable[[], list[Tensor]]) -> list[Graph]:
    """The graphs of a training step of fn, forward and backward, whose inputs are made as fake CUDA tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    graphs: list[Graph] = []
    torch._dynamo.reset()
    with _gpu(graphs), FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        inputs = make_inputs()
        out = torch.compile(fn, fullgraph=True)(*inputs)
        leaves = [x for x in inputs if x.requires_grad]
        if leaves:
            torch.autograd.grad(out, leaves, torch.empty_like(out))
    return graphs


class _Driver:
    """Triton's view of the GPU."""

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_benchmarker(self) -> Callable[..., float]:
        return lambda *args, **kwargs: 1.0


class _NoGuard(contextlib.nullcontext):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


def _patches() -> Iterator[Any]:
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import joint_graph, post_grad

    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: PROPERTIES.name,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "memory_allocated": lambda device=None: 0,
    }
    more = {
        "_lazy_init": lambda: None,
        "device": _NoGuard,
        "device_of": _NoGuard,
        "is_current_stream_capturing": lambda: False,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *args, **kwargs: None,
    }
    for name, answer in (answers | more).items():
        yield mock.patch.object(torch.cuda, name, answer)
    yield mock.patch.object(torch.accelerator, "is_available", return_value=False)
    interface = {name: answer for name, answer in answers.items() if name not in ("get_device_capability", "get_device_name")}
    interface |= {"exchange_device": lambda device: 0, "maybe_exchange_device": lambda device: 0}
    interface |= {"get_raw_stream": lambda device=0: 0, "get_compute_capability": lambda device=None: 90}
    for name, answer in interface.items():
        yield mock.patch.object(CudaInterface, name, staticmethod(answer))
    for name in ("get_device_properties", "current_device"):
        yield mock.patch.object(CudaInterface.Worker, name, staticmethod(answers[name]))
    for module in (joint_graph, post_grad):  # its patterns are traced on the device
        yield mock.patch.object(module, "lazy_init")


@contextlib.contextmanager
def _gpu(graphs: list[Graph]) -> Iterator[None]:
    import triton
    from torch._inductor import config, graph

    def compile_to_module(lowering: Any) -> Any:
        code, _ = lowering.codegen()
        results = next(node for node in lowering.orig_gm.graph.nodes if node.op == "output").args[0]
        values = [x.meta["val"] if isinstance(x, torch.fx.Node) else x for x in results]
        sizes = [x.numel() if isinstance(x, Tensor) else 0 for x in values]
        graphs.append(Graph(code.value if hasattr(code, "value") else str(code), sizes))

        def call(args: list[Any]) -> tuple[Any, ...]:
            args.clear()
            return tuple(x.new_empty_strided(x.shape, x.stride()) if isinstance(x, Tensor) else x for x in values)

        return SimpleNamespace(call=call, __file__="on paper", key="", runner=None, benchmark_compiled_module=None)

    triton.runtime.driver.set_active(_Driver())  # pyright: ignore[reportArgumentType]
    with contextlib.ExitStack() as stack:
        for patch in _patches():
            stack.enter_context(patch)
        for name in ("_compile_to_module", "compile_to_module"):
            stack.enter_context(mock.patch.object(graph.GraphLowering, name, compile_to_module))
        settings = {"joint_graph_constant_folding": False, "fx_graph_cache": False, "force_disable_caches": True}
        stack.enter_context(config.patch(settings | {"compile_threads": 1}))
        yield
