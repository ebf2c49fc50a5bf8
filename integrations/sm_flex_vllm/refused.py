"""The backends that do not serve StableMask, by name: vLLM's own classes, which refuse a config with stablemask at start.

sm_flex_vllm.refused.FLASHINFER is a subclass of vLLM's FlashInfer backend, made when vLLM asks for it.
"""

# pyright: reportMissingImports=false

from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.utils.import_utils import resolve_obj_by_qualname

from sm_flex_vllm import registry, settings

_MADE: dict[str, type] = {}


def __getattr__(name: str) -> type:
    if name not in registry.STOCK:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _MADE:
        _MADE[name] = _refusing(name, resolve_obj_by_qualname(registry.STOCK[name]))
    return _MADE[name]


def _refusing(name: str, stock: Any) -> type:
    def asked() -> bool:
        config = get_current_vllm_config_or_none()
        return config is not None and settings.asks(config.model_config)

    def refuse() -> None:
        if asked():
            raise NotImplementedError(f"config.stablemask is set, and {registry.why_refused(name)}")

    def get_impl_cls() -> type:
        """Called for each layer when the model is built."""
        refuse()
        return stock.get_impl_cls()

    def get_builder_cls() -> type:
        """Called for each kind of layer when the cache is made, also where a layer runs its attention by itself."""
        refuse()
        return stock.get_builder_cls()

    def validate_configuration(cls: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Called where vLLM chooses a backend by itself: it takes one that serves."""
        reasons = super(made, cls).validate_configuration(*args, **kwargs)
        return [*reasons, "StableMask not supported"] if asked() else reasons

    methods = {
        "get_impl_cls": staticmethod(get_impl_cls),
        "get_builder_cls": staticmethod(get_builder_cls),
        "validate_configuration": classmethod(validate_configuration),
    }
    made: Any = type(name, (stock,), {**methods, "__module__": __name__, "__doc__": f"{stock.__name__}, or a refusal."})
    return made
