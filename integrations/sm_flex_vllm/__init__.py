"""StableMask in vLLM, by a plugin: nothing is patched, and a model whose config has ``stablemask`` gets it without a flag.

    vllm serve MODEL
    python -m sm_flex_vllm check MODEL

vLLM finds the plugin by the entry point ``sm_flex`` of the group ``vllm.general_plugins`` and calls register() in each of its
processes. The served settings are those of the model's own config, as the Transformers adapter saves them:

    config.stablemask = {"gamma": "headwise", "length": 2048}

A backend that cannot serve such a config refuses it when the engine starts. The engine's log says what is served, once:

    StableMask: 32 heads, N = 8192, CPU_ATTN

This module imports nothing: vLLM logs and swallows an import error of a plugin, and would go on with plain causal attention. An
error that register() raises stops vLLM.
"""


def register() -> None:
    """Puts StableMask's backends in the place of vLLM's own, and a refusal before every other backend.

    Raises:
        ImportError: this vLLM has no registry of attention backends, so that nothing can be served or refused.
    """
    from sm_flex_vllm import registry

    registry.install()
