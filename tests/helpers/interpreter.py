"""Triton's interpreter, made to round as a GPU does."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch


@contextmanager
def rounds_bf16() -> Iterator[None]:
    """float32 becomes bf16 by rounding to nearest, ties to even. The interpreter of Triton 3.8 truncates."""
    if find_spec("triton") is None:
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert_float = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, *mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            floats = torch.from_numpy(np.ascontiguousarray(values).view(np.float32).copy())
            return floats.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
        return convert_float(values, source, target, *mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield
