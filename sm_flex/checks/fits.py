"""A StableMask against the call that it came with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sm_flex.checks.tensors import broadcasts
from sm_flex.score_mod import StableMask


def check_is_stablemask(score_mod: Any, function: str) -> None:
    """Where torch's own function of that name has no score_mod at all."""
    if not isinstance(score_mod, StableMask):
        raise TypeError(
            f"score_mod of {function} must be a StableMask or None, got {type(score_mod).__name__}: pass "
            "stablemask(gamma, length=N), and a function on the scores as stablemask(..., score_mod=...), or use flex_attention"
        )


def check_mask_fits(
    mask: StableMask,
    rows: Sequence[int],
    num_keys: int,
    device: torch.device,
    block_mask: BlockMask | None = None,
    *,
    values: Sequence[int] | None,
) -> None:
    """The mask against a call of rows (B, H, S): its heads, lengths, positions, devices and block_mask.

    values: the call's (Hkv, Dv), None where it has no values.
    """
    batch, heads, num_queries = rows
    _check_per_head("gamma", mask.gamma, heads, device, ": see headwise_gamma")
    if mask.sink is not None:
        _check_per_head("sink", mask.sink, heads, device)
        if mask.sink.dim() > 1 and not broadcasts(mask.sink.shape, rows):
            raise ValueError(f"sink must be broadcastable to (B, H, S) = {tuple(rows)}, got {tuple(mask.sink.shape)}")
    if mask.sink_value is not None:
        _check_sink_value_fits(mask.sink_value, heads, values, device)
    if not mask.ordered and block_mask is None:
        raise ValueError(
            "block_mask is required with stablemask(..., ordered=False), where it alone says which keys a query sees: "
            "use flex_attention"
        )
    if mask.positions is not None:
        check_positions_fit(mask.positions, batch, num_queries, device)
    elif num_queries != num_keys:
        raise ValueError(
            f"positions are required where query and key lengths differ, got S={num_queries} and T={num_keys}: "
            "pass stablemask(..., positions=..., length=...)"
        )


def _check_per_head(name: str, x: Tensor, heads: int, device: torch.device, way_out: str = "") -> None:
    if x.device != device and not (x.dim() == 0 and x.device.type == "cpu"):
        raise ValueError(f"{name} must be on the device of query, {device}, got {x.device}: use {name}.to({str(device)!r})")
    if x.dim() == 1 and x.shape[0] != heads:
        raise ValueError(f"{name} must have one value for each of the {heads} query heads, got {x.shape[0]}{way_out}")


def _check_sink_value_fits(value: Tensor, heads: int, values: Sequence[int] | None, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(
            f"sink_value must be on the device of query, {device}, got {value.device}: use sink_value.to({str(device)!r})"
        )
    if values is None:
        return
    kv_heads, dim = values
    if value.shape[0] not in (heads, kv_heads) or value.shape[1] != dim:
        raise ValueError(
            f"sink_value must be (H, Dv) = {(heads, dim)} or (Hkv, Dv) = {(kv_heads, dim)}, got {tuple(value.shape)}"
        )


def check_positions_fit(positions: Tensor, batch: int, count: int, device: torch.device, name: str = "positions") -> None:
    if positions.device != device:
        raise ValueError(f"{name} must be on the device of query, {device}, got {positions.device}")
    # Only sizes of the same dimension are compared: an exported graph would be told that S is never B.
    fits = positions.shape[-1] == count and (positions.dim() == 1 or (positions.dim() == 2 and positions.shape[0] == batch))
    if not fits:
        raise ValueError(f"{name} must be ({count},) or ({batch}, {count}), got {tuple(positions.shape)}")
