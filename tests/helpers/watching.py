"""Which operations ran, and which engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sm_flex.engines import autograd


class Operations(TorchDispatchMode):
    """Every operation that ran, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran.append(func)
        return func(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@contextmanager
def engines_used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The engines that autograd.attend was given; dense and flex do without it. A call that has a plan is one of "cpu"."""
    names: list[str] = []
    attend, planned = autograd.attend, autograd.attend_planned
    with monkeypatch.context() as patch:
        patch.setattr(autograd, "attend_planned", lambda *args: names.append("cpu") or planned(*args))
        patch.setattr(autograd, "attend", lambda engine, *args, **kw: names.append(engine) or attend(engine, *args, **kw))
        yield names
