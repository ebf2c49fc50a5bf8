"""How often a layer's attention runs in a forward and backward under torchtitan's own activation checkpointing.

A program of titan_driver.py. On a CPU flex runs as it does on a GPU, in a compiled region of its own, and the op that packed
documents take on a CPU, which nobody's list of what to save names, is put there.
"""

from typing import Any

import titan_configs
import torch
from torch._higher_order_ops.utils import redirect_to_mode
from torch._higher_order_ops.wrap import inductor_compiled_code
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.config.override import apply_overrides
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models.common.attention import FlexAttention

from sm_flex import flex_attention
from sm_flex_torchtitan.attention import StableFlexAttention

REGION, PACKED = inductor_compiled_code, torch.ops.sm_flex.varlen_cpu.default


class Count(TorchDispatchMode):
    """How often the ops ran."""

    supports_higher_order_operators = True

    def __init__(self, *ops: Any) -> None:
        super().__init__()
        self.ops, self.calls = ops, 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # or nothing would be compiled under it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func in self.ops
        return func(*args, **(kwargs or {}))


redirect_to_mode(REGION, Count)


class SaveAll(SelectiveAC):
    def get_save_ops(self) -> set:
        return super().get_save_ops() | {PACKED}


def main() -> dict[str, Any]:
    options: dict[str, Any] = {**FlexAttention.inductor_configs, "max_autotune": False, "coordinate_descent_tuning": False}
    StableFlexAttention.eager = torch.compile(flex_attention, options=options)
    counts = {}
    for backend in ("flex", "varlen"):
        for name, policy in (("selective", SaveAll), ("full", FullAC)):
            torch.manual_seed(0)
            config = (titan_configs.llama3 if backend == "flex" else titan_configs.llama3_varlen)()
            model = config.model_spec.model
            model.update_from_config(config=config)
            config.override.imports = ["sm_flex_torchtitan.overrides.stablemask"]
            apply_overrides(config.override, config)
            block = model.layers[0].build()
            block.init_states()
            block = policy(policy.Config())._wrap_block(block)
            positions_BL = torch.arange(256).remainder(100).expand(2, -1)
            masks = model.build().get_attention_masks(positions_BL)
            x_BLD = torch.randn(2, 256, 256, requires_grad=True)
            with Count(REGION, PACKED) as count:
                block(x_BLD, masks, positions_BL).square().sum().backward()
            assert x_BLD.grad is not None
            counts[f"{name} {backend}"] = [count.calls, x_BLD.grad.abs().sum().item()]
    return {"counts": counts}
