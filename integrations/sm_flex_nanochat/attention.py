"""nanochat's two attention functions, with StableMask: those of sm_flex.flash_attn with nanochat's signatures.

Its model calls flash_attn.flash_attn_func and flash_attn.flash_attn_with_kvcache, two entries of one object, and has no other
attention. They are not told N or gamma, so those are taken from the model when nanochat initialises its weights, which is
when it lies on its device (it is built on the meta device).

Shapes in names: B batch, S queries, T slots of the cache, H heads, D head dim.
"""

import functools
import inspect
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sm_flex import StableMask, flash_attn, stablemask
from sm_flex_launcher.flags import BadInput, Flags


class Functions:
    """flash_attn_func and flash_attn_with_kvcache for one model."""

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        self.gamma: Tensor | None = None
        self.length: int | None = None

    def prepare(self, config: Any, device: torch.device) -> None:
        """Take N and the heads from the model's config.

        Raises:
            BadInput: gamma has another number of heads, or a model of another length is in use.
        """
        if self.length not in (None, config.sequence_len):
            raise BadInput(f"one model length a process: sequence_len is {self.length}, and now {config.sequence_len}")
        self.gamma, self.length = self.flags.gamma_for(config.n_head).to(device), config.sequence_len

    def flash_attn_func(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window_size: tuple[int, int] = (-1, -1)
    ) -> Tensor:
        """(B, S, H, D) from q of that shape and k, v (B, S, Hkv, D)."""
        return flash_attn.flash_attn_func(q, k, v, causal=causal, window_size=window_size, score_mod=self._mask())

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        cache_seqlens: Tensor | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        """(B, S, H, D); k and v are written into the caches (B, T, Hkv, D) behind each row's cache_seqlens (B,)."""
        options: Any = {"cache_seqlens": cache_seqlens, "causal": causal, "window_size": window_size}
        out = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, score_mod=self._mask(), **options)
        assert isinstance(out, Tensor)
        return out

    def _mask(self) -> StableMask:
        if self.gamma is None:
            raise RuntimeError("no model has been initialised: call init_weights() of nanochat's GPT first")
        return stablemask(self.gamma, length=self.length)


def replace(flash_attention: ModuleType, gpt: ModuleType, flags: Flags) -> Functions:
    """Put StableMask in the place of flash_attention.flash_attn's two functions.

    Raises:
        BadInput: this nanochat has another interface.
    """
    functions = Functions(flags)
    try:
        theirs, model = flash_attention.flash_attn, gpt.GPT
        init_weights = model.init_weights
        for name in ("flash_attn_func", "flash_attn_with_kvcache"):
            taken, known = [list(inspect.signature(getattr(x, name)).parameters) for x in (theirs, functions)]
            if taken != known:
                raise BadInput(f"{name} of {flash_attention.__file__} takes {taken}, and StableMask knows {known}")
    except AttributeError as error:
        raise BadInput(f"{flash_attention.__file__} has not the interface of nanochat's: {error}") from None

    @functools.wraps(init_weights)
    def init_and_prepare(self: Any) -> None:
        init_weights(self)
        functions.prepare(self.config, self.get_device())

    model.init_weights = init_and_prepare
    theirs.flash_attn_func = functions.flash_attn_func
    theirs.flash_attn_with_kvcache = functions.flash_attn_with_kvcache
    return functions
