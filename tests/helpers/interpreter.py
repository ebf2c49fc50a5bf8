"""Triton's interpreter, made to round as a GPU does."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch


@contextmanager
def exact_bf16() -> Iterator[None]:
    """bf16 as PyTorch has it: rounded to nearest, ties to even. Triton 3.8 truncates here, and misreads subnormals."""
    if find_spec("triton") is None:
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert_float = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, *mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            floats = torch.from_numpy(np.ascontiguousarray(values).view(np.float32).copy())
            return floats.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
        if (source, target) == (tl.bfloat16, tl.float32):
            return np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16
        return convert_float(values, source, target, *mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield
