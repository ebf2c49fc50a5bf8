"""python -m sm_flex: what it prints is true of this machine."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

import sm_flex
from sm_flex import __main__ as main
from sm_flex import flex_attention, scaled_dot_product_attention, stablemask, varlen_attn
from tests.helpers import ROOT

LENGTH = 12
MASK = stablemask(0.5, length=LENGTH)


def packed(q: Tensor) -> Tensor:
    q, cu = q[0].transpose(0, 1), torch.tensor([0, 5, LENGTH], dtype=torch.int32)
    out = varlen_attn(q, q, q, cu, cu, 7, 7, score_mod=MASK, window_size=(-1, 0))
    assert isinstance(out, Tensor)
    return out


# One of each of main.CALLS; masked ones see every key, since causality comes with StableMask.
CALLS: dict[str, Callable[[Tensor], object]] = {
    "causal": lambda q: flex_attention(q, q, q, score_mod=MASK),
    "attn_mask": lambda q: scaled_dot_product_attention(q, q, q, torch.ones(LENGTH, LENGTH) > 0, score_mod=MASK),
    "block_mask": lambda q: flex_attention(
        q, q, q, score_mod=MASK, block_mask=create_block_mask(lambda b, h, i, j: i >= j, None, None, LENGTH, LENGTH, "cpu")
    ),
    "inner score_mod": lambda q: flex_attention(
        q, q, q, score_mod=stablemask(0.5, length=LENGTH, score_mod=lambda score, b, h, i, j: score * 0.5)
    ),
    "dropout": lambda q: scaled_dot_product_attention(q, q, q, dropout_p=0.5, is_causal=True, score_mod=MASK),
    "packed documents": packed,
}


class Ops(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", main.DTYPES)
@pytest.mark.parametrize("call", main.CALLS)
def test_the_engine_that_is_printed_is_the_one_that_runs(call: str, dtype: torch.dtype) -> None:
    """Of a CPU's engines cpu runs PyTorch's flash op, varlen_cpu an operator of its own, and dense neither."""
    with Ops() as ran:
        CALLS[call](torch.randn(1, 2, LENGTH, 8, dtype=dtype, requires_grad=True))
    flash = any("flash_attention_for_cpu" in name for name in ran.names)
    own = any("sm_flex" in name and "varlen" in name for name in ran.names)
    assert main.engine_for(call, dtype, "cpu") == ("varlen_cpu" if own else "cpu" if flash else "dense")


def test_the_command_prints_versions_devices_and_engines() -> None:
    done = subprocess.run([sys.executable, "-m", "sm_flex"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["sm_flex", sm_flex.__version__] in lines
    assert ["torch", f"{torch.__version__},"] in [line[:2] for line in lines]
    assert "cpu" in [line[0] for line in lines if line]
    assert ["inner", "score_mod", *[main.engine_for("inner score_mod", dtype, "cpu") for dtype in main.DTYPES]] in lines


def test_a_package_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "PACKAGES", ("no_such_package",))
    assert main.versions()["no_such_package"] == "not installed"


def test_each_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU number {i}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, i))
    found = main.devices()
    assert found["cuda:0"] == "GPU number 0, compute capability 9.0"
    assert found["cuda:1"] == "GPU number 1, compute capability 9.1"
