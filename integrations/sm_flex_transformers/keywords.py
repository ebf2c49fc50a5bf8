"""The keyword arguments that models hand their attention function: what each means to us.

Transformers lets every model pass what it likes. One that is unknown here may carry meaning (a selection of keys, a bias), so
it is refused by name, never swallowed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sm_flex.runtime import readable
from sm_flex_transformers.interface import layer_of, name_of

# Harmless, with the reason. A keyword that is None, or False, asks for nothing and is not looked up.
HARMLESS = {
    "sliding_window": "the mask holds the window, or the call is made within it",
    "token_type_ids": "the mask holds what they say",
    "mm_token_type_ids": "the mask holds what they say",
    "cu_seq_lens_q": "position_ids restart where they do; alone they are refused",
    "cu_seq_lens_k": "as cu_seq_lens_q",
    "max_length_q": "the longest document: kernels without a mask need it",
    "max_length_k": "as max_length_q",
    "seq_idx": "as cu_seq_lens_q, for layers that are no attention",
    "cache": "key and value are the cache's already",
    "past_key_values": "the name of cache before Transformers 5.24",
    "past_key_value": "as past_key_values",
    "cache_position": "position_ids and the mask say where the rows are",
    "input_ids": "the model's own inputs, for layers that are no attention",
    "inputs_embeds": "as input_ids",
    "use_cache": "about what the model returns",
    "position_embeddings": "query and key are rotated already",
    "output_hidden_states": "about what the model returns",
    "output_router_logits": "about what the model returns",
    "return_dict": "about what the model returns",
    "num_items_in_batch": "about the loss",
    "labels": "about the loss",
    "read_index": "of continuous batching: key and value are what it says already",
    "write_index": "as read_index",
    "logits_indices": "as logits_to_keep",
    "logits_processor_args": "about what is made of the logits",
    "logits_to_keep": "about what the model returns; rows that it drops are seen by their number",
}
# Refused, and what the model means by it.
REFUSED = {
    "head_mask": "a mask on its heads",
}
SINKS = ("s_aux", "sinks")
SELECTIONS = ("indices", "block_indices")
BIAS = "position_bias"


def check(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuses what is asked of the attention and not known here.

    Raises:
        NotImplementedError: naming the layer, the keyword and what it is.
    """
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise NotImplementedError(f"output_attentions=True: {name_of(module.config)} never forms the attention weights")
    for name, value in kwargs.items():
        if value is None or value is False or name in HARMLESS or name in (*SINKS, *SELECTIONS, BIAS):
            continue
        if name in REFUSED:
            raise NotImplementedError(
                f"{type(module).__name__} has {REFUSED[name]} ({name}), which {name_of(module.config)} does not take: "
                "use another attn_implementation"
            )
        raise NotImplementedError(
            f"{type(module).__name__} hands its attention {name}=, which {name_of(module.config)} does not know: it may "
            "change who sees whom or the scores, so it is not left out in silence"
        )


def sink(module: nn.Module, kwargs: dict[str, Any], query: Tensor) -> Tensor | None:
    """A model's attention sinks, one number per head, (H,), or per head and row, (B, H, S); None where it has none.

    Raises:
        TypeError, ValueError: of another shape, not floating, on another device; or, where that can be seen without waiting
            for a device, NaN or +inf.
    """
    found = next((kwargs[name] for name in SINKS if kwargs.get(name) is not None), None)
    if found is None:
        return None
    batch, heads, num_queries = query.shape[:3]
    has = f"{layer_of(module)}: its attention sinks"
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise TypeError(f"{has} must be a floating tensor, got {getattr(found, 'dtype', type(found).__name__)}")
    sinks = found.squeeze(-1) if found.dim() == 4 else found
    fits = sinks.shape == (heads,) if sinks.dim() == 1 else sinks.shape == (batch, heads, num_queries)
    if not fits:
        raise ValueError(
            f"{has} must be one number for each of its {heads} query heads, ({heads},), or for each head and row, "
            f"({batch}, {heads}, {num_queries}, 1), got {tuple(found.shape)}"
        )
    if sinks.device != query.device:
        raise ValueError(f"{has} must be on the device of its queries, {query.device}, got {sinks.device}")
    if readable(sinks) and not bool((sinks < torch.inf).all()):
        raise ValueError(f"{has} must be below inf and not NaN, got {sinks.detach()[~(sinks < torch.inf)][0].item()}")
    return sinks


def selected_keys(
    module: Any, kwargs: dict[str, Any], attention_mask: Tensor | None, position_ids: Tensor | None, query: Tensor, num_keys: int
) -> Tensor | None:
    """The keys that a model's own indexer left each query, bool (B, 1|H, S, T), or None where it selects none.

    indices (B, S, K) are keys (DeepSeek's sparse attention); block_indices are blocks of keys per group of heads (MiniMax M3),
    which the layer's indexer itself turns into a mask.

    Raises:
        NotImplementedError: a selection of another form.
    """
    indices, blocks = [kwargs.get(name) for name in SELECTIONS]
    if indices is not None:
        if indices.dim() != 3 or indices.shape[1] != query.shape[2]:
            raise NotImplementedError(
                f"{type(module).__name__} selects keys by indices of shape {tuple(indices.shape)}: "
                f"{name_of(module.config)} takes (B, S, K)"
            )
        none = torch.zeros(*indices.shape[:2], num_keys, dtype=torch.bool, device=query.device)
        return none.scatter(-1, indices.long(), True).unsqueeze(1)
    if blocks is not None:
        build = getattr(getattr(module, "indexer", None), "build_block_mask", None)
        if build is None or position_ids is None:
            raise NotImplementedError(
                f"{type(module).__name__} selects blocks of keys (block_indices) and has no indexer.build_block_mask that "
                "says which keys those are"
            )
        rows = position_ids[:, -query.shape[2] :]
        return build(blocks, attention_mask, num_keys, query.dtype, query.device, rows.expand(query.shape[0], -1)) == 0
    return None


def check_selected_within(module: nn.Module, told: Tensor | None, visible: Tensor | None) -> None:
    """A selection is made among the keys that the model's mask shows: refused where the documents in a row narrow it further."""
    if visible is not None and visible is not told:
        check_told_of_documents(module, "selects keys by itself", told, visible)


def check_told_of_documents(module: nn.Module, does: str, told: Tensor | None, visible: Tensor) -> None:
    """Raises NotImplementedError where told, the mask that the model has gone by, shows more than visible."""
    why = (
        f"{type(module).__name__} {does} and was not told of the packed documents in the row: call the model with "
        "use_cache=False and no attention_mask, where Transformers makes the mask for them"
    )
    within = told is not None and (told <= visible).all()
    if torch.compiler.is_compiling() and isinstance(within, Tensor):
        torch.ops.aten._assert_async.msg(within, why)
    elif not within:
        raise NotImplementedError(why)


def bias_on_scores(
    module: nn.Module, kwargs: dict[str, Any], mask_bias: Tensor | None, query: Tensor, num_keys: int, softcap: float | None
) -> Tensor | None:
    """What the model adds to the real scores, (1|B, 1|H, S, T): position_bias (Inkling), and a float mask's own (Doge).

    Raises:
        NotImplementedError: a bias of another form, or beside soft-capping, where the order of the two is not known.
    """
    bias = kwargs.get(BIAS)
    if bias is not None:
        batch, heads, num_queries = query.shape[:3]
        fits = bias.dim() == 4 and bias.shape[0] in (1, batch) and bias.shape[1] in (1, heads)
        if not fits or bias.shape[2] != num_queries or bias.shape[3] < num_keys:
            raise NotImplementedError(
                f"{type(module).__name__} has a bias on the scores (position_bias) of shape {tuple(bias.shape)}: "
                f"{name_of(module.config)} takes (B, H, S, T), here {(batch, heads, num_queries, num_keys)}"
            )
        bias = bias[..., :num_keys]  # the unused slots of a static cache
    if mask_bias is not None:
        bias = mask_bias if bias is None else bias + mask_bias
    if bias is not None and softcap is not None:
        raise NotImplementedError(
            f"{type(module).__name__} has soft-capping and a bias on the scores: {name_of(module.config)} takes one of them"
        )
    return bias


def biased(bias: Tensor, visible: Tensor | None, dtype: torch.dtype, num_keys: int) -> Tensor:
    """bias as the float mask of a call with num_keys keys, of which the last may be some that nobody sees."""
    bias = F.pad(bias.to(dtype), (0, num_keys - bias.shape[-1]))
    return bias if visible is None else bias.masked_fill(~visible, -torch.inf)
