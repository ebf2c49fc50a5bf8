"""The arguments of stablemask()."""

import sys
from typing import Any

import torch
from torch import Tensor

from sm_flex.runtime import readable


def check_gamma(gamma: Any) -> Tensor:
    """gamma as a tensor: a number becomes 0-d float64."""
    if isinstance(gamma, Tensor):
        if not gamma.is_floating_point():
            raise TypeError(f"gamma must be a floating tensor, got dtype {gamma.dtype}")
        if gamma.dim() > 1:
            raise ValueError(f"gamma must be 0-d or (H,), one value per query head, got shape {tuple(gamma.shape)}")
        if gamma.numel() == 0:
            raise ValueError("gamma must hold at least one value, got an empty tensor")
        if readable(gamma):
            if gamma.isnan().any():
                raise ValueError("gamma must not be NaN")
            # A learned gamma may drift a little below 0 between two steps; log M continues there.
            if not gamma.requires_grad and bool((gamma < 0).any()):
                raise ValueError(f"gamma must be >= 0, got {gamma.min().item()}")
        return gamma
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)):
        raise TypeError(f"gamma must be a number or a floating tensor, got {type(gamma).__name__}")
    if gamma != gamma:
        raise ValueError("gamma must not be NaN")
    if gamma < 0:
        raise ValueError(f"gamma must be >= 0, got {gamma}")
    if gamma > sys.float_info.max and gamma != float("inf"):
        raise ValueError(f"gamma must be a float64 or inf, got an int of {len(str(gamma))} digits")
    return torch.tensor(float(gamma), dtype=torch.float64)


def check_sink(sink: Any) -> Tensor:
    """sink as a tensor: a number becomes 0-d float64."""
    if isinstance(sink, Tensor):
        if not sink.is_floating_point():
            raise TypeError(f"sink must be a floating tensor, got dtype {sink.dtype}")
        if sink.dim() > 3:
            raise ValueError(f"sink must be 0-d, (H,), or broadcastable to (B, H, S), got shape {tuple(sink.shape)}")
        if readable(sink) and not bool((sink < torch.inf).all()):
            raise ValueError("sink must be below inf and not NaN: it is the log of a mass")
        return sink
    if isinstance(sink, bool) or not isinstance(sink, (int, float)):
        raise TypeError(f"sink must be a number or a floating tensor, got {type(sink).__name__}")
    if not sink < float("inf"):
        raise ValueError(f"sink must be a number below inf, got {sink}")
    if abs(sink) > sys.float_info.max and sink != -float("inf"):
        raise ValueError(f"sink must be a float64, or -inf, got an int of {len(str(abs(sink)))} digits")
    return torch.tensor(float(sink), dtype=torch.float64)


def check_sink_value(sink_value: Any, sink: Any) -> None:
    if not isinstance(sink_value, Tensor):
        raise TypeError(f"sink_value must be a floating tensor, got {type(sink_value).__name__}")
    if sink is None:
        raise ValueError(
            "sink is required where sink_value is given: pass stablemask(..., sink=...), the level of its pseudo score"
        )
    if not sink_value.is_floating_point():
        raise TypeError(f"sink_value must be a floating tensor, got dtype {sink_value.dtype}")
    if sink_value.dim() != 2:
        raise ValueError(f"sink_value must be (H, Dv), one value per head, got shape {tuple(sink_value.shape)}")
    if readable(sink_value) and not bool(sink_value.isfinite().all()):
        raise ValueError("sink_value must be finite, got NaN or inf")


def check_length(length: Any) -> None:
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
        raise TypeError(f"length must be an int, the training length, got {type(length).__name__}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")


def check_positions(positions: Any) -> None:
    check_integers(positions, "positions")
    if positions.dim() not in (1, 2):
        raise ValueError(f"positions must be (S,) or (B, S), got shape {tuple(positions.shape)}")


def check_integers(positions: Any, name: str) -> None:
    if not isinstance(positions, Tensor):
        raise TypeError(f"{name} must be an integer tensor such as torch.tensor([5]), got {type(positions).__name__}")
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an integer tensor, int32 or int64, got dtype {positions.dtype}")


def check_position_values(positions: Tensor) -> None:
    if readable(positions) and positions.numel() and bool((positions < 0).any()):
        raise ValueError(f"positions must be >= 0, got {positions.min().item()}: for padding use positions.clamp(min=0)")
