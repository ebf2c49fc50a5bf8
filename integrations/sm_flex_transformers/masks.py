"""Which key each query sees: the mask function that Transformers calls once a forward, and masks that a user made.

Dimension letters: B sequences, S queries, T keys.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers.masking_utils import sdpa_mask

# Every layer of a forward is handed the same tensors, and reading one on a GPU waits for it: what was found out is kept.
_CHECKED = WeakIdKeyDictionary()  # masks of stablemask_mask
_RESTARTS = WeakIdKeyDictionary()  # position ids: (version, whether a row holds another 0)


def stablemask_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """sdpa_mask of Transformers: a bool mask (B, 1, S, T), True is visible, or None where plain causal attention is meant.

    Raises:
        NotImplementedError: the mask is bidirectional, or lets some query see a later key. A StableMask is causal.
    """
    if "allow_is_bidirectional_skip" in kwargs:
        raise NotImplementedError(
            "stablemask is causal and this layer asks for a bidirectional mask: use another attn_implementation for encoders"
        )
    mask = sdpa_mask(*args, **kwargs)
    # A single new token has no later key, and to look would wait for the GPU in every decode step.
    if mask is None or mask.shape[2] == 1 or torch.compiler.is_compiling():
        return mask
    first_query, first_key = (int(kwargs.get(name, 0)) for name in ("q_offset", "kv_offset"))
    _check_causal(mask, first_query - first_key)
    _CHECKED[mask] = True
    return mask


def visible_keys(mask: Tensor | None, num_queries: int, num_keys: int) -> Tensor | None:
    """What a layer was given as a bool mask (B, 1, S, T); a mask that the user made may be a float padding mask."""
    if mask is None:
        return None
    if torch.compiler.is_compiling():
        if mask.dtype != torch.bool:
            raise TypeError(f"a custom attention mask must be bool under torch.compile with stablemask, got {mask.dtype}")
        return mask
    made_by_us = mask in _CHECKED or (mask.dtype == torch.bool and num_queries == 1)
    return mask if made_by_us else _read(mask, num_queries, num_keys)


def _read(mask: Tensor, num_queries: int, num_keys: int) -> Tensor:
    if mask.dim() != 4 or mask.shape[-2:] != (num_queries, num_keys):
        raise ValueError(
            f"a custom attention mask must be (B, 1, S, T) with S={num_queries} and T={num_keys}, got {tuple(mask.shape)}"
        )
    visible = mask
    if mask.is_floating_point():
        visible = mask == 0
        if not (visible | (mask <= torch.finfo(mask.dtype).min)).all():
            raise NotImplementedError(
                "a float attention mask must hold 0 where a key is visible and the dtype's minimum or -inf where it is not: "
                "stablemask takes no additive bias this way, use sm_flex.stablemask(..., score_mod=...) in a model of your own"
            )
    elif mask.dtype != torch.bool:
        raise TypeError(f"a custom attention mask must be bool or floating, got {mask.dtype}")
    _check_causal(visible, num_keys - num_queries)
    return visible


def _check_causal(visible: Tensor, offset: int) -> None:
    """Query i stands in slot i + offset."""
    if visible.triu(offset + 1).any():
        raise NotImplementedError(
            "the attention mask lets a query see a later key (bidirectional blocks, a prefix, an image): a StableMask is causal"
        )


def within_documents(visible: Tensor | None, position_ids: Tensor) -> Tensor | None:
    """visible, narrowed to each row's documents where position_ids restart at 0; for a call that holds whole sequences.

    Transformers finds packed rows itself only where there is no cache, and a forward without gradients makes one.
    """
    if torch.compiler.is_compiling() or not _restarts(position_ids):
        return visible
    starts_BS = position_ids == 0
    if visible is not None:  # padding is given position 0 as well
        starts_BS = starts_BS & _real(visible)
    document_BS = starts_BS.cumsum(-1)
    same_B1SS = document_BS[:, None, :, None] == document_BS[:, None, None, :]
    return same_B1SS if visible is None else visible & same_B1SS


def _restarts(position_ids: Tensor) -> bool:
    if position_ids.is_inference():  # no version to know a changed one by
        return bool((position_ids[:, 1:] == 0).any())
    if position_ids not in _RESTARTS or _RESTARTS[position_ids][0] != position_ids._version:
        _RESTARTS[position_ids] = (position_ids._version, bool((position_ids[:, 1:] == 0).any()))
    return _RESTARTS[position_ids][1]


def from_first_token(position_ids: Tensor, visible: Tensor) -> Tensor:
    """Positions (B, S) counted from each row's first real token, for a call that holds whole sequences.

    Transformers' default is 0..S-1 whatever the padding. Relative encodings do not notice, the mass would: a row whose first
    real token stands in slot j and has position j > 0 is counted from there. Any other position ids are taken at their word.
    """
    real_BS = _real(visible)
    position_ids = position_ids.expand(real_BS.shape[0], -1)
    slot_B1 = real_BS.int().argmax(dim=1, keepdim=True)
    default_B1 = position_ids.gather(1, slot_B1) == slot_B1
    return torch.where(default_B1, (position_ids - slot_B1).clamp(min=0), position_ids)


def _real(visible: Tensor) -> Tensor:
    """(B, S): a padding slot does not even see itself."""
    return visible[:, 0].diagonal(dim1=-2, dim2=-1)
