"""Which class vLLM finds under the name of each attention backend: served, or refused for a config with stablemask.

Every class made here is a subclass of the one that vLLM would have used, and behaves as that one for any other model.
"""

# pyright: reportMissingImports=false

import functools
from typing import Any

import vllm

SERVED = {
    "CPU_ATTN": "sm_flex_vllm.cpu.StableMaskCPUBackend",
    "FLASH_ATTN": "sm_flex_vllm.flash.StableMaskFlashBackend",
    "FLEX_ATTENTION": "sm_flex_vllm.flex.StableMaskFlexBackend",
}
VERSIONS = ((0, 32), (0, 33))  # the first that is served, and the first that is not
# By the name of each backend that refuses: the class that vLLM would have used.
STOCK: dict[str, str] = {}


def install() -> None:
    """Registers a class for each backend of vLLM, and for each model that goes past them. May be called again."""
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        raise ImportError(
            f"sm_flex_vllm serves vLLM {served_versions()} and this is {vllm.__version__}, where it can neither serve nor refuse "
            "a model with stablemask. To run other models, leave the plugin out: VLLM_PLUGINS=''"
        ) from error
    for backend in AttentionBackendEnum:
        # A name without a class of its own is there for a plugin to fill.
        path = backend.get_path() if backend.value or backend.is_overridden() else ""
        if not path or path.startswith("sm_flex_vllm."):
            continue
        if version_is_served() and path == backend.value and backend.name in SERVED:
            register_backend(backend, SERVED[backend.name])
        else:
            STOCK[backend.name] = path
            register_backend(backend, f"sm_flex_vllm.refused.{backend.name}")
    if version_is_served():  # another vLLM may have another registry of models
        from sm_flex_vllm import refused_models

        refused_models.install()


def version_is_served() -> bool:
    version: Any = vllm.__version_tuple__
    return VERSIONS[0] <= tuple(version[:2]) < VERSIONS[1]


def served_versions() -> str:
    (first, last) = (".".join(map(str, version)) for version in VERSIONS)
    return f"from {first} on and before {last}"


@functools.cache
def why_refused(name: str) -> str:
    """Why a backend does not serve a config with stablemask, and the way out."""
    if not version_is_served():
        return f"sm_flex_vllm serves vLLM {served_versions()}, this is {vllm.__version__}"
    if name in SERVED:
        return f"another plugin has put {STOCK[name]} in the place of vLLM's {name}; leave that plugin out by VLLM_PLUGINS"
    return f'the backend {name} does not serve it. On a GPU pass attention_backend="FLASH_ATTN" or "FLEX_ATTENTION"'
