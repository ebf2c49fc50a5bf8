"""What a model was called with, where its layers are not handed it: forward hooks of every model that runs our attention."""

import functools
import inspect
import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from sm_flex_transformers import settings, sharding
from sm_flex_transformers.interface import NAMES, name_of, note_model


class _Running(threading.local):
    """Of the forward that runs in this thread."""

    masked = False  # whether the mask function was given a 2-D attention_mask
    position_ids: "weakref.ref[Tensor] | None" = None  # what the model was called with
    cached = True  # whether it may keep a cache
    calls = 0  # of stablemask_attention
    inside = False  # whether a forward runs
    read: Any = None  # by the last of its layers (alike.py)


class _Traced:
    """The same, of a forward that is compiled: only what a trace may write and read."""

    masked = False
    has_position_ids = False
    called = False


_RUNNING, _TRACED = _Running(), _Traced()
# By position ids, whether they came with a 2-D attention_mask: a checkpointed layer runs again when others have run.
_MASKED = WeakIdKeyDictionary()
_CALLS = WeakIdKeyDictionary()  # models: calls when their forward began
_PROVEN = WeakIdKeyDictionary()  # models that have called stablemask_attention


def watch(model: PreTrainedModel) -> None:
    """Registers the hooks, once."""
    note_model(type(model), model.config.model_type)
    if not any(getattr(hook, "func", None) is before for hook in model._forward_pre_hooks.values()):
        names = tuple(inspect.signature(model.forward).parameters)
        model.register_forward_pre_hook(functools.partial(before, names), with_kwargs=True)
    if after not in model._forward_hooks.values() and model.main_input_name == "input_ids":
        model.register_forward_hook(after)


def before(names: tuple[str, ...], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """names: of forward's parameters, for arguments that come by their place."""
    given = {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs
    position_ids, mask = given.get("position_ids"), given.get("attention_mask")
    if torch.compiler.is_compiling():
        _TRACED.has_position_ids = position_ids is not None
        settings.hand_down_first(model.config)
        return
    settings.hand_down(model.config)
    sharding.check_plan(model)
    use_cache = given.get("use_cache")
    kept = any(given.get(name) is not None for name in ("cache", "past_key_values"))
    _RUNNING.cached = kept or (getattr(model.config, "use_cache", True) if use_cache is None else use_cache)
    _RUNNING.position_ids = weakref.ref(position_ids) if isinstance(position_ids, Tensor) else None
    if isinstance(position_ids, Tensor) and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)):
        _MASKED[position_ids] = mask is not None
    _CALLS[model] = _RUNNING.calls
    _RUNNING.inside, _RUNNING.read = True, None
    if model not in _PROVEN:
        _TRACED.called = False  # compiled layers set it again


def after(model: Any, args: tuple[Any, ...], output: Any) -> None:
    """Raises NotImplementedError where a first forward went by without a call of stablemask_attention."""
    if torch.compiler.is_compiling():
        return
    _RUNNING.inside, _RUNNING.read = False, None
    if model in _PROVEN:
        return
    text = model.config.get_text_config()
    if not {model.config._attn_implementation, text._attn_implementation} & set(NAMES):
        return  # it was told to take another since
    if _CALLS.get(model) == _RUNNING.calls and not _TRACED.called:
        name = name_of(text)
        raise NotImplementedError(
            f"{type(model).__name__} ran without calling {name}: its code does not use Transformers' attention interface, so "
            "attn_implementation has no effect on it"
        )
    _PROVEN[model] = True


def note_call() -> None:
    """For stablemask_attention: it was called."""
    if torch.compiler.is_compiling():
        _TRACED.called = True
    else:
        _RUNNING.calls += 1


def read_by_a_layer() -> Any:
    """What keep_read() was given in the running forward."""
    return _RUNNING.read


def keep_read(read: Any) -> None:
    """Until the running forward ends."""
    if _RUNNING.inside:
        _RUNNING.read = read


def note_mask(padding: Any) -> None:
    """For stablemask_mask: what it was given."""
    (_TRACED if torch.compiler.is_compiling() else _RUNNING).masked = padding is not None


def came_with_a_mask(position_ids: Tensor | None) -> bool:
    """Whether the model was called with a 2-D attention_mask: where the mask function returns None, nothing else tells."""
    if torch.compiler.is_compiling():
        return _TRACED.masked
    known = None if position_ids is None else _MASKED.get(position_ids)
    return _RUNNING.masked if known is None else known


def lost_positions(num_queries: int) -> bool:
    """For a layer that is handed no position_ids: whether its model was, and others than 0..S-1."""
    if torch.compiler.is_compiling():
        return _TRACED.has_position_ids  # their values cannot be asked
    given = given_positions(num_queries)
    if given is None:
        return False
    return not bool((given == torch.arange(num_queries, device=given.device)).all())


def may_have_a_cache() -> bool:
    """Whether the running forward may keep a cache: Transformers then makes no mask for packed rows."""
    return _RUNNING.cached


def given_positions(num_queries: int) -> Tensor | None:
    """For a layer that is handed no position_ids: those that its model was called with, where they can be read.

    A layer that is checkpointed and runs again, in a backward, may follow the forward of another batch.
    """
    if torch.compiler.is_compiling() or _RUNNING.position_ids is None or torch._C._current_graph_task_id() != -1:
        return None
    given = _RUNNING.position_ids()
    return None if given is None or given.device.type == "meta" or given.shape[-1] != num_queries else given
