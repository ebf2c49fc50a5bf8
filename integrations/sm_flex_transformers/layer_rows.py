"""Who sees whom in one layer's call: read from its mask, its positions and its keywords.

Dimension letters: B sequences, S queries, T keys, D head dim.
"""

from typing import Any, NamedTuple

from torch import Tensor

from sm_flex_transformers import forwards, keywords, masks, windows
from sm_flex_transformers.interface import extends_its_mask, layer_of, leaves_its_window_out, tells_its_masks_positions


class Rows(NamedTuple):
    """Query i sees the keys up to slot i + T - S that none of these hides.

    key, value: (B, Hkv, T, D), without slots that no query sees.
    positions: of the queries, (B|1, S), or None where they are not told.
    documents: packed ones in a row, which do not see one another.
    told: bool (B, 1|H, S, T), what the layer's mask says.
    selected: bool (B, 1|H, S, T), the keys that the model's own indexer left.
    bias: (1|B, 1|H, S, T), added to the scores.
    window: how many keys a query sees, its own included, where the mask does not say so.
    ordered: whether slots follow the sequence. False: told alone says who sees whom.
    """

    key: Tensor
    value: Tensor
    positions: Tensor | None
    documents: masks.Documents | None
    told: Tensor | None
    selected: Tensor | None
    bias: Tensor | None
    window: int | None
    ordered: bool


def read(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    placed: bool,
    softcap: float | None,
    given: dict[str, Any],
) -> Rows:
    """placed: whether the mass goes by positions. given: the other keywords of the layer's call.

    Raises:
        TypeError, ValueError, NotImplementedError: what cannot be told, or not be served.
    """
    at = position_ids if position_ids is not None and position_ids.dim() == 2 else None
    num_queries, num_keys = query.shape[2], key.shape[2]
    num_positions = num_queries if at is None else at.shape[1]
    ordered = not extends_its_mask(module.config.model_type)
    if attention_mask is None and not ordered:
        raise ValueError(f"{layer_of(module)} has keys behind the others and got no attention_mask that says who sees them")
    if attention_mask is None and 1 < num_positions < num_keys:  # the unused slots of a static cache
        key, value = key[:, :, :num_positions], value[:, :, :num_positions]
        num_keys = num_positions
    seen = masks.read(attention_mask, at, num_queries, num_keys, ordered)
    bias = keywords.bias_on_scores(module, given, seen.bias, query, num_keys, softcap)
    if placed and at is None:
        _check_default_positions(module, seen.visible is not None or num_queries != num_keys, num_queries)
    if not placed and position_ids is None:
        _check_documents(module, seen, num_queries, num_keys)
    positions, documents = at, None
    if at is not None:
        positions = masks.positions_of(seen, at, num_queries, num_keys) if placed else at
        documents = masks.documents(seen, at, num_queries, num_keys)
    bounds = given.get("cu_seq_lens_q")
    if bounds is not None and len(bounds) > 2 and seen.visible is None and documents is None:
        raise ValueError("cu_seq_lens_q needs position_ids that restart in each document: pass those too")
    selected = keywords.selected_keys(module, given, attention_mask, at, query, num_keys)
    named = None if leaves_its_window_out(type(module).__module__) else given.get("sliding_window")
    window = windows.width(named, attention_mask, num_keys)
    if window is not None and documents is None and bias is None and selected is None and num_queries < num_keys:
        key, value = [x[:, :, max(0, num_keys - num_queries - window + 1) :] for x in (key, value)]
        window = window if num_queries > 1 else None
    return Rows(key, value, positions, documents, seen.visible, selected, bias, window, ordered)


def visible(module: Any, rows: Rows, query: Tensor) -> Tensor | None:
    """All that rows say as one mask, bool (B|1, 1|H, S, T), or None where that is plain causal attention."""
    num_queries, num_keys = query.shape[2], rows.key.shape[2]
    found = rows.told
    if rows.documents is not None:
        same = masks.same_document(rows.documents, num_queries)
        found = same if found is None else found & same
    if rows.selected is not None:
        keywords.check_selected_within(module, rows.told, found)
        found = rows.selected if found is None else found & rows.selected
    if rows.window is not None or (found is None and 1 < num_queries < num_keys):
        found = windows.narrowed(found, rows.window, num_queries, num_keys, query.device)
    return found


def _check_documents(module: Any, seen: masks.Seen, num_queries: int, num_keys: int) -> None:
    """A layer that is handed no position_ids cannot keep packed documents apart: its mask must, where the model makes it so."""
    given = forwards.given_positions(num_queries)
    if given is None or given.dim() != 2 or not forwards.may_have_a_cache():
        return
    if not tells_its_masks_positions(module.config.model_type):
        return  # packed documents mix in its own attention too
    documents = masks.documents(seen, given, num_queries, num_keys)
    if documents is not None:
        same = masks.same_document(documents, num_queries)
        keywords.check_told_of_documents(module, "is handed no position_ids", seen.visible, same)


def _check_default_positions(module: Any, masked: bool, num_queries: int) -> None:
    """Without position_ids only a plain call is served: the positions 0..S-1, no mask and no cache."""
    if masked or forwards.lost_positions(num_queries):
        raise ValueError(
            f"{type(module).__name__} got no position_ids, and this call has a mask, a cache or positions of its own, so "
            "stablemask cannot tell where its rows are: pass position_ids to the model. Where that does not help, the model does "
            "not hand them to its attention, and only its plain calls are served"
        )
