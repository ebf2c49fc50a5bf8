"""nanochat's two attention functions, with StableMask: same signatures, same (B, S, H, D) layout, same cache written in place.

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

from sm_flex import StableMask, scaled_dot_product_attention, stablemask, varlen_attn
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
        window = _window(causal, window_size)
        batch, length = q.shape[:2]
        grouped, mask = q.shape[2] != k.shape[2], self._mask()
        if window < 0 or window >= length:
            q, k, v = [x.transpose(1, 2) for x in (q, k, v)]
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped, score_mod=mask).transpose(1, 2)
        # Rows of one length, packed: the only drop-in whose kernels have a window.
        cu = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * length
        q, k, v = [x.flatten(0, 1) for x in (q, k, v)]
        out = varlen_attn(
            q, k, v, cu, cu, length, length, window_size=(window, 0), enable_gqa=grouped, score_mod=mask
        )  # fmt: skip
        return out.unflatten(0, (batch, length))

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
        window = _window(causal, window_size)
        if k is None or v is None or cache_seqlens is None:
            raise NotImplementedError("k, v and cache_seqlens are required by flash_attn_with_kvcache with a StableMask")
        positions_BS = cache_seqlens.long()[:, None] + torch.arange(q.shape[1], device=q.device)
        row_B1 = torch.arange(q.shape[0], device=q.device)[:, None]
        k_cache[row_B1, positions_BS] = k
        v_cache[row_B1, positions_BS] = v
        slot_T = torch.arange(k_cache.shape[1], device=q.device)
        visible_BST = slot_T <= positions_BS[..., None]
        if window >= 0:
            visible_BST &= slot_T >= positions_BS[..., None] - window
        out_BHSD = scaled_dot_product_attention(
            q.transpose(1, 2), k_cache.transpose(1, 2), v_cache.transpose(1, 2), visible_BST[:, None],
            enable_gqa=q.shape[2] != k_cache.shape[2], score_mod=self._mask(positions_BS),
        )  # fmt: skip
        return out_BHSD.transpose(1, 2)

    def _mask(self, positions_BS: Tensor | None = None) -> StableMask:
        if self.gamma is None:
            raise RuntimeError("no model has been initialised: call init_weights() of nanochat's GPT first")
        return stablemask(self.gamma, length=self.length, positions=positions_BS)


def replace(flash_attention: ModuleType, gpt: ModuleType, flags: Flags) -> Functions:
    """Put StableMask in the place of flash_attention.flash_attn's two functions.

    Raises:
        BadInput: this nanochat has another interface.
    """
    functions = Functions(flags)
    try:
        flash_attn, model = flash_attention.flash_attn, gpt.GPT
        init_weights = model.init_weights
        for name in ("flash_attn_func", "flash_attn_with_kvcache"):
            theirs, ours = [list(inspect.signature(getattr(x, name)).parameters) for x in (flash_attn, functions)]
            if theirs != ours:
                raise BadInput(f"{name} of {flash_attention.__file__} takes {theirs}, and StableMask knows {ours}")
    except AttributeError as error:
        raise BadInput(f"{flash_attention.__file__} has not the interface of nanochat's: {error}") from None

    @functools.wraps(init_weights)
    def init_and_prepare(self: Any) -> None:
        init_weights(self)
        functions.prepare(self.config, self.get_device())

    model.init_weights = init_and_prepare
    flash_attn.flash_attn_func = functions.flash_attn_func
    flash_attn.flash_attn_with_kvcache = functions.flash_attn_with_kvcache
    return functions


def _window(causal: bool, window_size: tuple[int, int]) -> int:
    """How many keys before its own a query sees, or -1 for all."""
    left, right = window_size
    if not causal or right > 0:
        raise ValueError(f"causal must be True and the right window 0 with a StableMask, got {causal} and {window_size}")
    return left
