"""What torch is doing at the moment (compiling, tracing, casting), and every private name of torch we touch.

A new release of torch may move a private name, so all of them stand in this file. They were seen in torch
2.11, 2.13 and 2.14:

    torch._C._are_functorch_transforms_active()                  is a torch.func transform open?
    torch._C._functorch.is_functorch_wrapped_tensor(x)           does one of them hold x?
    torch._C._is_tracing()                                       is torch.jit.trace recording?
    torch._C._len_torch_dispatch_stack()                         how many dispatch modes watch the operations
    torch._C._get_flash_sdp_enabled()                            does sdpa_kernel() allow FLASH_ATTENTION?
    torch.autograd.forward_ad._current_level                     -1 where forward-mode differentiation is not open
    torch._fused_sdp_choice(...)                                 the SDPBackend that scaled_dot_product_attention would take
    torch.nn.attention.flex_attention._vmap_for_bhqkv            a score_mod over ranges of its indices
    torch.ops.aten._scaled_dot_product_*                         the kernels of scaled_dot_product_attention
    torch.ops.aten._softmax_backward_data                        the backward of softmax, from its result
    torch.ops.torch_attn._varlen_attn, ..._backward              the kernel of varlen_attn
"""

import math
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.attention.varlen
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import _vmap_for_bhqkv

BEFORE_2_13, BEFORE_2_14 = torch.__version__ < "2.13", torch.__version__ < "2.14"
# A CPU build of torch comes without Triton, and ROCm has never been tried.
HAS_TRITON = torch.version.cuda is not None and find_spec("triton") is not None
# The type of the devices that the CUDA kernels serve. Where there is no GPU, tests put a model of the kernels on
# another.
KERNEL_DEVICE = "cuda"

# Of no subclass, which may not hold its values.
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)

vmap_bhqkv = _vmap_for_bhqkv
flash_sdp_enabled = torch._C._get_flash_sdp_enabled
transforms_active = torch._C._are_functorch_transforms_active
flash_op = torch.ops.aten._scaled_dot_product_flash_attention
flash_backward_op = torch.ops.aten._scaled_dot_product_flash_attention_backward
cudnn_op = torch.ops.aten._scaled_dot_product_cudnn_attention
cudnn_backward_op = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
efficient_op = torch.ops.aten._scaled_dot_product_efficient_attention
efficient_backward_op = torch.ops.aten._scaled_dot_product_efficient_attention_backward
cpu_flash_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# cpu_flash_op for eager code, sooner called.
cpu_flash_function = torch._scaled_dot_product_flash_attention_for_cpu  # pyright: ignore[reportPrivateImportUsage]
cpu_flash_backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
softmax_backward_op = torch.ops.aten._softmax_backward_data
varlen_op = torch.ops.torch_attn._varlen_attn
varlen_backward_op = torch.ops.torch_attn._varlen_attn_backward


def device_type(device: torch.device) -> str:
    """The type of the device, "cuda" where the CUDA kernels serve it: the one place that is asked which they serve."""
    return "cuda" if device.type == KERNEL_DEVICE else device.type


def fused_sdp_choice(*args: Any, **kwargs: Any) -> int:
    """The value of the SDPBackend that torch's scaled_dot_product_attention would take, eagerly."""
    return torch._fused_sdp_choice(*args, **kwargs)  # pyright: ignore[reportPrivateImportUsage]


def readable(x: Tensor) -> bool:
    """Whether the values of x can be looked at without a graph break or a host synchronisation."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return type(x) in PLAIN_TENSORS and not torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore


def watched() -> bool:
    """Whether a dispatch mode sees each operation: fake tensors, a selective checkpoint, a counter."""
    return torch._C._len_torch_dispatch_stack() > 0


def plain_eager() -> bool:
    """Whether nothing looks on: no compiler, no trace, no forward-mode differentiation, no dispatch mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def differentiable(*inputs: Tensor | None) -> bool:
    """Whether autograd records what is done with the inputs."""
    if torch.is_grad_enabled():
        for x in inputs:
            if x is not None and x.requires_grad:
                return True
    return False


def check_no_transform() -> None:
    """Raise inside a torch.func transform, which cannot see through the autograd Functions here."""
    if not torch.compiler.is_compiling() and transforms_active():
        raise NotImplementedError(
            "StableMask attention cannot run inside a torch.func transform (vmap, grad, vjp, jvp, ...): use torch.autograd, "
            "and the batch dimension instead of vmap"
        )


def score_dtype(x: Tensor) -> torch.dtype:
    """The dtype of scores, log M and lse for a query of x's dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def score_scale(scale: float | None, head_dim: int) -> float:
    """The scale of the scores. A head dim of 0 has no scores to scale."""
    if scale is not None:
        return float(scale)
    return 1 / math.sqrt(head_dim) if head_dim else 1.0


def _autocasts(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda", "mps", "xpu") and torch.is_autocast_enabled(device.type)


def autocast(query: Any, *others: Any) -> list[Any]:
    """The inputs as autocast casts scaled_dot_product_attention's: floating tensors but float64 take its dtype."""
    if not isinstance(query, Tensor) or not _autocasts(query.device):
        return [query, *others]  # the others are on the device of query, or will be refused
    dtype = torch.get_autocast_dtype(query.device.type)

    def casts(x: Any) -> bool:
        return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64

    return [x.to(dtype) if casts(x) else x for x in (query, *others)]


def no_autocast(device: torch.device) -> AbstractContextManager:
    """The engines choose their own precision: nothing inside them may be cast."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device) else nullcontext()
