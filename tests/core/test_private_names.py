"""Every private name of torch that the package touches stands in runtime.py, where a new release of torch is looked through."""

import re
from pathlib import Path

import sm_flex

PACKAGE = Path(sm_flex.__file__).parent
PRIVATE = re.compile(
    r"\b(?:torch|aten|forward_ad|torch_flex|torch_varlen|torch_attn)(?:\.\w+)*\._(?!_)\w+|^from torch[\w.]* import .*\b_\w+", re.M
)


def private_names(source: str) -> list[str]:
    return PRIVATE.findall(source)


def test_only_runtime_touches_private_names_of_torch():
    files = [path for path in PACKAGE.rglob("*.py") if "testing" not in path.parts]
    assert {path.relative_to(PACKAGE).as_posix() for path in files if private_names(path.read_text())} == {"runtime.py"}


def test_a_private_name_is_noticed():
    for line in (
        "torch._C._are_functorch_transforms_active()",
        "torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)",
        "forward_ad._current_level",
        "from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode",
    ):
        assert private_names(f"import torch\n{line}\n"), line
    assert not private_names("from torch.library import triton_op, wrap_triton\ntorch.ops.sm_flex.varlen_cpu(q)\n")
