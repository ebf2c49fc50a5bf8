"""A model of PyTorch's CUDA attention ops on CPU tensors, on which the tests of the CUDA paths run without a GPU.

An op of the model does with its arguments what a caller of the real one can see: it allocates the layouts that the kernel
allocates, reads the memory that the kernel reads (not what the strides of a tensor say, where the kernel goes by others), pads
what it pads, refuses what it refuses, and leaves NaN in all that the kernel leaves uninitialised. The arithmetic is that of
attention, plain and slow.

    contract.py    what each op takes for granted of its arguments' metadata, with its source; alone in spy.py
    flash.py, cudnn.py, efficient.py    the ops
    choice.py      which of them torch's scaled_dot_product_attention would take
    spy.py         the contract on fake CUDA tensors

Agreement with the model says that the library keeps to the contract as it is written here, and nothing of what a GPU does.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from torch.library import Library

from sm_flex import runtime
from sm_flex.epilogue import remask
from tests.helpers.cuda_model import choice, cudnn, efficient, flash
from tests.helpers.triton_rounding import exact_bf16

OPS: dict[str, Any] = {
    "_scaled_dot_product_flash_attention": flash.sdpa,
    "_scaled_dot_product_flash_attention_backward": flash.sdpa_backward,
    "_flash_attention_forward": flash.packed,
    "_flash_attention_backward": flash.packed_backward,
    "_scaled_dot_product_cudnn_attention": cudnn.sdpa,
    "_scaled_dot_product_cudnn_attention_backward": cudnn.sdpa_backward,
    "_scaled_dot_product_efficient_attention": efficient.sdpa,
    "_scaled_dot_product_efficient_attention_backward": efficient.sdpa_backward,
}


@contextmanager
def installed() -> Iterator[None]:
    """CPU tensors take the CUDA paths, down to the ops of the model."""
    library = Library("aten", "IMPL")
    cudnn.GRAPHS.clear()
    try:
        with pytest.MonkeyPatch.context() as patch, exact_bf16() if runtime.HAS_TRITON else nullcontext():
            for name, op in OPS.items():
                library.impl(name, op, "CPU")
            patch.setattr(runtime, "KERNEL_DEVICE", "cpu")
            choice.patch_torch(patch)
            if os.environ.get("TRITON_INTERPRET") != "1":  # a Triton that compiles has no use for CPU tensors
                patch.setattr(remask, "kernel", None)
            yield
    finally:
        library._destroy()
