"""config.stablemask's "sink": the log of one more mass per row, and "sink_value": what that mass carries.

In a config both are plain lists, which JSON keeps to the bit. A layer finds the tensors of its own here.

H query heads, Hkv key heads, L layers, Dv value head dim.
"""

import copy
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

SINK, SINK_VALUE = 'config.stablemask["sink"]', 'config.stablemask["sink_value"]'
# Layers' lists that were read: (how they stood, their tensor), by the list's id, which is but a hint.
_KEPT: dict[tuple[int, torch.device], tuple[Any, Tensor]] = {}
MAX_KEPT = 4096


def level(given: Any, layer: int | None, num_layers: int, num_heads: int, device: torch.device, keep: bool) -> Tensor | None:
    """The level of a layer, float64, 0-d or (H,); None where its entry of a list by layers is None.

    given: a number, one per query head, or a list of L that has for each layer None or one per query head.
    keep lets calls share the tensor: not of a trace.

    Raises:
        TypeError, ValueError: naming the key, the rule, what came and the way out.
    """
    own, where = given, SINK
    if isinstance(given, (list, tuple)) and given and (given[0] is None or isinstance(given[0], (list, tuple))):
        own, where = _of_layer(given, SINK, layer, num_layers)
        if own is None:
            return None
        if not isinstance(own, (list, tuple)):
            raise TypeError(f"{where} must be a list with one number per query head, or None, got {own!r}")
    if isinstance(own, (list, tuple)):
        return _tensor(own, device, keep, lambda: _levels(own, num_heads, where))
    make = _kept_number if keep and type(own) in (int, float) else _number
    return make(own, device)


def values(given: Any, layer: int | None, num_layers: int, device: torch.device, keep: bool) -> Tensor | None:
    """What the mass of a layer carries, float64, (H, Dv) or (Hkv, Dv); None where its entry of a list by layers is None.

    given: heads by numbers, or a list of L that has for each layer None or that.

    Raises:
        TypeError, ValueError: naming the key, the rule, what came and the way out.
    """
    if not isinstance(given, (list, tuple)) or not given:
        raise TypeError(
            f"{SINK_VALUE} must be a list with Dv numbers for each query or key head, or one such list for each layer, "
            f"got {_short(given)}"
        )
    own, where = given, SINK_VALUE
    first = given[0]
    if first is None or (isinstance(first, (list, tuple)) and first and isinstance(first[0], (list, tuple))):
        own, where = _of_layer(given, SINK_VALUE, layer, num_layers)
        if own is None:
            return None
    return _tensor(own, device, keep, lambda: _table(own, where))


def _of_layer(given: Any, name: str, layer: int | None, num_layers: int) -> tuple[Any, str]:
    if layer is None:
        raise ValueError(f"{name} is a list by layers, and the layer does not know its number (layer_idx): give it one per head")
    if len(given) != num_layers or layer >= num_layers:
        raise ValueError(
            f"{name} must have one entry for each of the model's {num_layers} layers, got {len(given)}"
            + (f" and a layer numbered {layer}" if layer >= num_layers else "")
        )
    return given[layer], f"{name} of layer {layer}"


def _tensor(own: Any, device: torch.device, keep: bool, make: Any) -> Tensor:
    """make() on the device, or what it made of the same list before: to read 90 x 64 numbers anew costs more than a layer."""
    if not keep:
        return _to(make(), device)
    known = _KEPT.get((id(own), device))
    if known is None or known[0] != own:
        if len(_KEPT) >= MAX_KEPT:
            _KEPT.clear()
        known = _KEPT[id(own), device] = (copy.deepcopy(own), _kept(make, device))
    return known[1]


def _kept(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """make() on the device, for any later call: what inference_mode makes cannot be saved for a backward."""
    with torch.inference_mode(False):
        return _to(make(), device)


def _levels(own: Any, num_heads: int, where: str) -> Tensor:
    _check_numbers(own, where, "be a number, have one number per query head, or one such list for each layer")
    if len(own) != num_heads:
        raise ValueError(f"{where} must have one number for each of the {num_heads} query heads, got {len(own)}: {_short(own)}")
    return _checked(own, where)


def _number(own: Any, device: torch.device) -> Tensor:
    _check_numbers([own], SINK, "be a number, have one number per query head, or one such list for each layer", own)
    return _kept(lambda: _checked([own], SINK)[0], device)


_kept_number = lru_cache(maxsize=64)(_number)


def _checked(own: Any, where: str) -> Tensor:
    if not all(x < float("inf") for x in own):  # NaN too
        wrong = next(x for x in own if not x < float("inf"))
        raise ValueError(f"{where} must be below inf and not NaN, the log of a mass (-inf is none), got {wrong}")
    return torch.tensor([float(x) for x in own], dtype=torch.float64, device="cpu")


def _table(own: Any, where: str) -> Tensor:
    rule = "have Dv numbers for each query or key head"
    if not isinstance(own, (list, tuple)) or not own or not all(isinstance(head, (list, tuple)) and head for head in own):
        raise TypeError(f"{where} must {rule}, or one such list for each layer, got {_short(own)}")
    for head in own:
        _check_numbers(head, where, rule)
    dims = sorted({len(head) for head in own})
    if len(dims) > 1:
        raise ValueError(f"{where} must {rule}, the same Dv for all, got {' and '.join(map(str, dims))} numbers")
    if not all(abs(x) < float("inf") for head in own for x in head):
        raise ValueError(f"{where} must be finite, got {next(x for head in own for x in head if not abs(x) < float('inf'))}")
    return torch.tensor([[float(x) for x in head] for head in own], dtype=torch.float64, device="cpu")


def _check_numbers(own: Any, where: str, rule: str, shown: Any = None) -> None:
    for x in own:
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            raise TypeError(f"{where} must {rule}, got {_short(own if shown is None else shown)}")
        if isinstance(x, int) and abs(x) > sys.float_info.max:
            raise ValueError(f"{where} must have numbers of float64, got an int of {len(str(abs(x)))} digits")


def _short(given: Any) -> str:
    said = repr(given)
    return said if len(said) <= 80 else said[:77] + "..."


def _to(x: Tensor, device: torch.device) -> Tensor:
    return x.to(device) if device.type in ("cpu", "cuda", "meta") else x.to(device, torch.float32)
