"""Which key each query sees: the mask function that Transformers calls once a forward, and masks that a user made.

Dimension letters: B sequences, S queries, P positions (S, or more where the model dropped rows), T keys.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary
from transformers.masking_utils import sdpa_mask

from sm_flex_transformers import forwards, windows
from sm_flex_transformers.interface import check_model_type, extends_its_mask, name_of

NOT_CAUSAL = (
    "the attention mask lets a query see a later key (bidirectional blocks, a prefix, an image): this attention is causal"
)


class Padding(NamedTuple):
    """Of a mask that stablemask_mask made from a 2-D padding mask."""

    before_B1: Tensor  # padding slots before each row's first token
    slots_P: Tensor  # each query's slot
    real_BP: Tensor  # whether a query is a token


class Seen(NamedTuple):
    """Who sees whom in a layer's call, and what is known of it."""

    visible: Tensor | None  # bool (B, 1, S, T); None: plain causal attention
    by_user: bool  # a mask that the user made
    masked: bool  # the model was called with a 2-D attention_mask, padding or not
    padding: Padding | None
    bias: Tensor | None = None  # floating, (B, 1|H, S, T): what a float mask adds to the scores of visible keys


# Every layer of a forward is handed the same tensors, and reading one on a GPU waits for it: what was found out is kept.
# Masks of stablemask_mask, by their memory, since a model may hand on a slice.
_MADE: dict[StorageWeakRef, tuple[int, Seen]] = {}
_RESTARTS = WeakIdKeyDictionary()  # position ids: (version, masked, padding, Documents)


def stablemask_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """sdpa_mask of Transformers: a bool mask (B, 1, S, T), True is visible, or None where plain causal attention is meant.

    None too for a sliding window where nothing is padded or packed: its layers say how wide it is. A float mask for models that
    put keys of their own behind the mask's, and cast what they say of them to its dtype (DeepSeek V4).

    Raises:
        NotImplementedError: the mask is bidirectional, or lets some query see a later key (a StableMask is causal); or the model
            does not use Transformers' attention interface, so that its attention would go on without StableMask or a mask.
    """
    check_model_type(kwargs["config"].model_type)
    if "allow_is_bidirectional_skip" in kwargs:
        raise NotImplementedError(
            f"{name_of(kwargs['config'])} is causal and this model asks for a bidirectional mask, as encoders and "
            "cross-attention do: use another attn_implementation"
        )
    padding = kwargs.get("attention_mask")
    forwards.note_mask(padding)
    if extends_its_mask(kwargs["config"].model_type):
        mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
        assert mask is not None
        dtype = kwargs["dtype"]
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    if windows.layers_apply_it(kwargs) and not _may_be_padded(padding, kwargs["q_length"] + kwargs.get("q_offset", 0)):
        return None
    mask = sdpa_mask(*args, **kwargs)
    if mask is None or not has_values(mask):
        return mask
    first_query, num_queries = kwargs.get("q_offset", 0), mask.shape[2]
    # A single new token has no later key, and to look would wait for the GPU in every decode step.
    if num_queries > 1:
        _check_causal(mask, int(first_query) - int(kwargs.get("kv_offset", 0)))
    for memory in [memory for memory in tuple(_MADE) if memory.expired()]:
        _MADE.pop(memory, None)
    made = Seen(None, False, padding is not None, None if padding is None else _padding(padding, first_query, num_queries))
    _MADE[StorageWeakRef(mask.untyped_storage())] = _version(mask), made
    return mask


def _may_be_padded(mask_BT: Tensor | None, num_slots: int) -> bool:
    return mask_BT is not None and (not has_values(mask_BT) or mask_BT.shape[1] < num_slots or not mask_BT.all())


def _padding(mask_BT: Tensor, first_query: int | Tensor, num_queries: int) -> Padding:
    before_B1 = (mask_BT.cumsum(-1) == 0).sum(-1, keepdim=True)
    slots_P = torch.arange(num_queries, device=mask_BT.device) + first_query
    known = mask_BT.shape[1] - 1  # slots behind the 2-D mask are padding to Transformers
    real_BP = mask_BT.index_select(1, slots_P.clamp(max=known)).bool() & (slots_P <= known)
    return Padding(before_B1, slots_P, real_BP)


def has_values(x: Tensor) -> bool:
    """Whether the values of x can be looked at: it is not traced, not fake and not on the meta device."""
    return not (torch.compiler.is_compiling() or x.device.type == "meta" or isinstance(x, FakeTensor))


def read(mask: Tensor | None, position_ids: Tensor | None, num_queries: int, num_keys: int, ordered: bool = True) -> Seen:
    """What a layer was given. A mask that the user or the model made may be floating, and add to the scores.

    ordered: False where the keys stand in no order, so that the mask is not asked whether it is causal by their slots.
    """
    masked = forwards.came_with_a_mask(position_ids)
    if mask is None:
        return Seen(None, False, masked, None)
    if not ordered:
        return Seen(mask == 0 if mask.is_floating_point() else mask, True, True, None)
    if not has_values(mask):
        return Seen(_traced(mask, num_queries, num_keys), False, masked, None)
    version, made = _MADE.get(StorageWeakRef(mask.untyped_storage())) or (None, None)
    if made is not None and version == _version(mask):
        return made._replace(visible=mask)
    visible = _as_bool(mask, num_queries, num_keys)
    return Seen(visible, True, True, None, mask if _adds(mask, visible) else None)


def _version(mask: Tensor) -> int:
    """Of the tensor and its views: a write in place moves it on. A tensor of inference mode has none."""
    return 0 if mask.is_inference() else mask._version


def _traced(mask: Tensor, num_queries: int, num_keys: int) -> Tensor:
    if mask.dtype != torch.bool:
        raise TypeError(f"a custom attention mask must be bool under torch.compile, got {mask.dtype}")
    if num_queries > 1 and torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(~mask.triu(num_keys - num_queries + 1).any(), NOT_CAUSAL)
    return mask


def _as_bool(mask: Tensor, num_queries: int, num_keys: int) -> Tensor:
    if mask.dim() != 4 or mask.shape[-2:] != (num_queries, num_keys):
        raise ValueError(
            f"a custom attention mask must be (B, 1, S, T) with S={num_queries} and T={num_keys}, got {tuple(mask.shape)}"
        )
    visible = mask
    if mask.is_floating_point():
        visible = ~(mask <= torch.finfo(mask.dtype).min)  # a NaN is no key that nobody sees
    elif mask.dtype != torch.bool:
        raise TypeError(f"a custom attention mask must be bool or floating, got {mask.dtype}")
    _check_causal(visible, num_keys - num_queries)
    return visible


def _adds(mask: Tensor, visible: Tensor) -> bool:
    """Whether a mask is more than padding. One that is learned may be all 0 and wants its gradient."""
    return mask.is_floating_point() and (mask.requires_grad or bool((visible & (mask != 0)).any()))


def _check_causal(visible: Tensor, offset: int) -> None:
    """Query i stands in slot i + offset."""
    if visible.triu(offset + 1).any():
        raise NotImplementedError(NOT_CAUSAL)


def positions_of(seen: Seen, position_ids: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """The queries' positions (B|1, S), counted from each row's first real token where they are Transformers' default.

    The default is the slot, whatever the padding before it. Relative encodings do not notice, the mass would. A row all of
    whose tokens are at their slots has it; any other row's position_ids are taken at their word.
    """
    num_positions, visible, padding = position_ids.shape[1], seen.visible, seen.padding
    whole = num_positions == num_queries == num_keys
    if padding is None and visible is not None and whole and (seen.by_user or not has_values(visible)):
        real_BP = _real(visible)  # the mask itself must tell what is padding
        slots_P = torch.arange(num_positions, device=position_ids.device)
        padding = Padding(real_BP.int().argmax(dim=1, keepdim=True), slots_P, real_BP)
    if padding is not None:
        default_B1 = ((position_ids == padding.slots_P) | ~padding.real_BP).all(-1, keepdim=True)
        position_ids = torch.where(default_B1, (position_ids - padding.before_B1).clamp(min=0), position_ids)
    return position_ids if num_positions == num_queries else position_ids[:, num_positions - num_queries :]


class Documents(NamedTuple):
    """Of packed rows."""

    starts_BP: Tensor  # (B|1, P), True where a new document starts within the row
    cu_seqlens: Tensor | None  # of all rows one after another, int32; None where it cannot be looked at


def documents(seen: Seen, position_ids: Tensor, num_queries: int, num_keys: int) -> Documents | None:
    """The documents that each row holds, for a call that holds whole sequences; None where each row is one.

    Transformers finds packed rows itself only where there is no cache, and a forward makes one by default.
    """
    visible, num_positions = seen.visible, position_ids.shape[1]
    if num_positions != num_keys or num_positions == 1:
        return None
    readable = has_values(position_ids) and (visible is None or has_values(visible))
    if seen.by_user and readable:
        return None
    real_BP = None if seen.padding is None else seen.padding.real_BP
    if not readable and visible is not None:
        real_BP = _real(visible)
    starts_BP = _document_starts(position_ids, seen.masked, real_BP)
    return Documents(starts_BP, None) if not readable else _looked_at(position_ids, seen, starts_BP)


def same_document(documents: Documents, num_queries: int) -> Tensor:
    """Bool (B|1, 1, S, P)."""
    document_BP = documents.starts_BP.cumsum(-1)
    return document_BP[:, None, -num_queries:, None] == document_BP[:, None, None, :]


def _document_starts(position_ids: Tensor, masked: bool, real_BP: Tensor | None) -> Tensor:
    """(B|1, P), True where a new document starts within the row.

    Without a 2-D attention_mask that is any position that is not its predecessor + 1, as Transformers has it. With one it is
    a token at 0, or before its predecessor: positions may then have gaps.
    """
    slots_P = torch.arange(position_ids.shape[1], device=position_ids.device)
    # roll() and not slices, whose length S - 1 an exported graph would be told is never 1.
    before = position_ids.roll(1, dims=-1)
    if not masked:
        return (position_ids != before + 1) & (slots_P > 0)
    inner = slots_P > 0
    if real_BP is not None:
        last_real_BP = torch.where(real_BP, slots_P, -1).cummax(-1).values.roll(1, dims=-1)
        before = position_ids.expand(real_BP.shape[0], -1).gather(1, last_real_BP.clamp(min=0))
        inner = inner & real_BP & (last_real_BP >= 0)
    return ((position_ids < before) | (position_ids == 0)) & inner


def _looked_at(position_ids: Tensor, seen: Seen, starts_BP: Tensor) -> Documents | None:
    if position_ids.is_inference() or position_ids.device.type == "cpu":  # cheap to look at, and not every write has a version
        return _if_any(starts_BP)
    version, masked, padding, answer = _RESTARTS.get(position_ids) or (None, None, None, None)
    if version != position_ids._version or masked != seen.masked or padding is not seen.padding:
        answer = _if_any(starts_BP)
        _RESTARTS[position_ids] = (position_ids._version, seen.masked, seen.padding, answer)
    return answer


def _if_any(starts_BP: Tensor) -> Documents | None:
    if not starts_BP.any():
        return None
    first_BP = starts_BP.clone()
    first_BP[:, 0] = True
    ends = torch.tensor([first_BP.numel()], device=first_BP.device)
    return Documents(starts_BP, torch.cat([first_BP.flatten().nonzero().squeeze(1), ends]).int())


def _real(visible: Tensor) -> Tensor:
    """(B, T): a padding slot does not even see itself; of rows that were dropped, what the others see is all that counts."""
    rows_BST = visible[:, 0] if visible.shape[1] == 1 else visible.any(1)  # heads may have selections of their own
    return rows_BST.diagonal(dim1=-2, dim2=-1) if rows_BST.shape[-2] == rows_BST.shape[-1] else rows_BST.any(1)
