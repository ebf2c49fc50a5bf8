"""Models that bring attention layers of their own to vLLM, past its registry of backends: they refuse a config with stablemask.

Without this they would be served as plain causal. Each is vLLM's own class, with a refusal before its __init__.
"""

# pyright: reportMissingImports=false

import functools
from typing import Any

from vllm.model_executor.models.registry import ModelRegistry, _LazyRegisteredModel

from sm_flex_vllm import settings

# Kernels of vLLM's own for one family each, and a model that hands its layers a backend.
MODULES = ("vllm.models.", "vllm.model_executor.models.openpangu")


class Refusing(_LazyRegisteredModel):
    """vLLM's entry for such a model: the same module, class and cached properties, and a subclass when it is loaded."""

    def load_model_cls(self) -> Any:
        return _refusing(super().load_model_cls())


def install() -> None:
    """Puts a refusal before each such model of vLLM's registry. May be called again."""
    for name, model in ModelRegistry.models.items():
        if type(model) is _LazyRegisteredModel and model.module_name.startswith(MODULES):
            ModelRegistry.models[name] = Refusing(model.module_name, model.class_name)


@functools.cache
def _refusing(stock: Any) -> type:
    @functools.wraps(stock.__init__)  # vLLM reads the names of its arguments
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if settings.asks(kwargs["vllm_config"].model_config):
            raise NotImplementedError(
                f"config.stablemask is set, and StableMask does not serve {stock.__name__}: vLLM's code of this model brings "
                "attention layers of its own"
            )
        stock.__init__(self, *args, **kwargs)

    return type(stock.__name__, (stock,), {"__init__": init, "__module__": stock.__module__, "__qualname__": stock.__qualname__})
