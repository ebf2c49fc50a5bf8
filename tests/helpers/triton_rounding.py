"""bf16 in Triton's interpreter, rounded as a GPU rounds it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


@contextmanager
def exact_bf16() -> Iterator[None]:
    """Conversions between float32 and bf16 by PyTorch, to nearest even. Triton's own truncates, or loses the carry."""
    import triton.language as tl
    from triton.runtime import interpreter

    triton_s = interpreter._convert_float

    def convert(data: Any, from_type: Any, to_type: Any, rounding_mode: Any) -> Any:
        if (from_type, to_type) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(data.copy()).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view("uint16").reshape(data.shape)
        if (from_type, to_type) == (tl.bfloat16, tl.float32):
            exact = torch.from_numpy(data.view("int16").copy()).view(torch.bfloat16).float()
            return exact.numpy().reshape(data.shape)
        return triton_s(data, from_type, to_type, rounding_mode)

    with mock.patch.object(interpreter, "_convert_float", convert):
        yield
