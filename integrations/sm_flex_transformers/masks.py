"""Which key each query sees: the mask function that Transformers calls once a forward, and masks that a user made.

Dimension letters: B sequences, S queries, T keys.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

NOT_CAUSAL = "the attention mask lets a query see a later key (bidirectional blocks, a prefix, an image): a StableMask is causal"


class Padding(NamedTuple):
    """Of a mask that stablemask_mask made: padding slots before each row's first token (B, 1), and each query's slot (S,)."""

    before: Tensor
    slots: Tensor


# Every layer of a forward is handed the same tensors, and reading one on a GPU waits for it: what was found out is kept.
_MADE = WeakIdKeyDictionary()  # masks of stablemask_mask, each with its Padding or None
_RESTARTS = WeakIdKeyDictionary()  # position ids: (version, whether a row holds another 0)


def stablemask_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """sdpa_mask of Transformers: a bool mask (B, 1, S, T), True is visible, or None where plain causal attention is meant.

    Raises:
        NotImplementedError: the mask is bidirectional, or lets some query see a later key (a StableMask is causal); or the model
            does not use Transformers' attention interface, so that its attention would go on without StableMask or a mask.
    """
    model_type = kwargs["config"].model_type
    if not uses_the_interface(model_type):
        raise NotImplementedError(
            f"{model_type} models do not use Transformers' attention interface: attn_implementation has no effect on them"
        )
    if "allow_is_bidirectional_skip" in kwargs:
        raise NotImplementedError(
            "stablemask is causal and this layer asks for a bidirectional mask: use another attn_implementation for encoders"
        )
    mask = sdpa_mask(*args, **kwargs)
    if mask is None or torch.compiler.is_compiling():
        return mask
    first_query, num_queries, padding = kwargs.get("q_offset", 0), mask.shape[2], kwargs.get("attention_mask")
    # A single new token has no later key, and to look would wait for the GPU in every decode step.
    if num_queries > 1:
        _check_causal(mask, int(first_query) - int(kwargs.get("kv_offset", 0)))
    if padding is None:
        _MADE[mask] = None
    else:
        before = (padding.cumsum(-1) == 0).sum(-1, keepdim=True)
        _MADE[mask] = Padding(before, torch.arange(num_queries, device=mask.device) + first_query)
    return mask


@torch._dynamo.assume_constant_result
def uses_the_interface(model_type: str) -> bool:
    """Whether Transformers' own models of this type look their attention up; a type that it does not know is trusted."""
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_MAPPING:
        return True
    found: Any = MODEL_MAPPING[CONFIG_MAPPING[model_type]]
    return all(x._can_set_attn_implementation() for x in (found if isinstance(found, (list, tuple)) else [found]))


def visible_keys(mask: Tensor | None, num_queries: int, num_keys: int) -> Tensor | None:
    """What a layer was given as a bool mask (B, 1, S, T); a mask that the user made may be a float padding mask."""
    if mask is None:
        return None
    if torch.compiler.is_compiling():
        if mask.dtype != torch.bool:
            raise TypeError(f"a custom attention mask must be bool under torch.compile with stablemask, got {mask.dtype}")
        if num_queries > 1:
            torch.ops.aten._assert_async.msg(~mask.triu(num_keys - num_queries + 1).any(), NOT_CAUSAL)
        return mask
    return mask if mask in _MADE else _read(mask, num_queries, num_keys)


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
        raise NotImplementedError(NOT_CAUSAL)


def within_documents(visible: Tensor | None, position_ids: Tensor) -> Tensor | None:
    """visible, narrowed to each row's documents where position_ids restart at 0; for a call that holds whole sequences.

    Transformers finds packed rows itself only where there is no cache, and a forward without gradients makes one.
    """
    if not torch.compiler.is_compiling():  # there neither can be asked
        by_the_user = visible is not None and visible not in _MADE
        if by_the_user or not _restarts(position_ids):
            return visible
    starts_BS = position_ids == 0
    if visible is not None:  # padding is given position 0 as well
        starts_BS = starts_BS & _real(visible)
    document_BS = starts_BS.cumsum(-1)
    same_B1SS = document_BS[:, None, :, None] == document_BS[:, None, None, :]
    return same_B1SS if visible is None else visible & same_B1SS


def _restarts(position_ids: Tensor) -> bool:
    if position_ids.is_inference() or position_ids.device.type == "cpu":  # cheap to look at, and not every write has a version
        return bool((position_ids[:, 1:] == 0).any())
    if position_ids not in _RESTARTS or _RESTARTS[position_ids][0] != position_ids._version:
        _RESTARTS[position_ids] = (position_ids._version, bool((position_ids[:, 1:] == 0).any()))
    return _RESTARTS[position_ids][1]


def from_first_token(position_ids: Tensor, visible: Tensor, num_keys: int) -> Tensor:
    """Positions (B, S) counted from each row's first real token.

    Transformers' default is the slot, whatever the padding before it. Relative encodings do not notice, the mass would: a
    position that is its slot is counted from the first real token. Any other position ids are taken at their word.
    """
    padding = None if torch.compiler.is_compiling() else _MADE.get(visible)
    num_queries = position_ids.shape[1]
    if padding is None and num_queries != num_keys:  # a cached step compiled, or with a mask that the user made
        return position_ids
    if padding is None:
        before_B1 = _real(visible).int().argmax(dim=1, keepdim=True)
        slots_S = torch.arange(num_queries, device=position_ids.device)
    else:
        before_B1, slots_S = padding
    return torch.where(position_ids == slots_S, (position_ids - before_B1).clamp(min=0), position_ids)


def _real(visible: Tensor) -> Tensor:
    """(B, S), of whole sequences: a padding slot does not even see itself."""
    return visible[:, 0].diagonal(dim1=-2, dim2=-1)
