"""gamma per head: the head-wise rule of the paper, and gamma and length as a config writes them."""

import sys
from typing import Any

import torch
from torch import Tensor


def headwise_gamma(num_heads: int) -> Tensor:
    """One gamma per head, by ALiBi's rule for its slopes: 2^(-8h/H) for h = 1..H where H is a power of two.

    Otherwise the slopes of the power of two below H come first, then every other slope of the power of two
    above (Press et al. 2022, get_slopes). This is "head-wise gamma" of the paper's Table 6.

    Args:
        num_heads: H >= 1.

    Returns:
        float32 (H,), on the CPU.

    Raises:
        TypeError, ValueError: num_heads is not an int, or below 1.

    Example:
        >>> headwise_gamma(2)
        tensor([0.0625, 0.0039])
    """
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an int, got {type(num_heads).__name__}")
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")

    def slopes(power: int) -> list[float]:
        return [2.0 ** (-8 * (h + 1) / power) for h in range(power)]

    below = 1 << (num_heads.bit_length() - 1)
    return torch.tensor(slopes(below) + slopes(2 * below)[0::2][: num_heads - below], dtype=torch.float32, device="cpu")


def gamma_from(spec: Any, num_heads: int, *, name: str = "gamma") -> Tensor:
    """gamma as a config writes it, as the tensor that :func:`sm_flex.stablemask` takes.

    Args:
        spec: "headwise" (see :func:`sm_flex.headwise_gamma`), a number >= 0 for all heads (inf is plain
            causal attention), or a list or tuple of such numbers, one per query head.
        num_heads: H, the query heads of the model.
        name: what an error calls spec, such as 'config.stablemask["gamma"]'.

    Returns:
        float64 on the CPU: 0-d for a single number, else (H,).

    Raises:
        TypeError, ValueError: naming spec by name, the rule and what came.

    Example:
        >>> gamma_from([0.5, 0.25], num_heads=2)
        tensor([0.5000, 0.2500], dtype=torch.float64)
        >>> gamma_from("headwise", num_heads=2)
        tensor([0.0625, 0.0039], dtype=torch.float64)
    """
    if isinstance(spec, str) and spec == "headwise":
        return headwise_gamma(num_heads).double()
    numbers: Any = spec if isinstance(spec, (list, tuple)) else (spec,)
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in numbers):
        raise TypeError(f'{name} must be "headwise", a number or a list of numbers, got {spec!r}')
    if not all(x >= 0 for x in numbers):  # NaN too
        raise ValueError(f"{name} must be >= 0 (inf is plain causal attention), got {spec!r}")
    if any(x > sys.float_info.max and x != float("inf") for x in numbers):
        raise ValueError(f"{name} must be a float64 or inf, got an int beyond float64")
    if numbers is spec and len(numbers) != num_heads:
        raise ValueError(
            f"{name} must have one number for each of the model's {num_heads} query heads, got {len(numbers)}: {spec!r}"
        )
    gamma = torch.tensor([float(x) for x in numbers], dtype=torch.float64, device="cpu")
    return gamma if numbers is spec else gamma[0]


def length_from(spec: Any, *, name: str = "length") -> int:
    """N, the training length, as a config writes it: an int, at least 1. name is what an error calls it.

    Raises:
        TypeError, ValueError: naming spec by name, the rule and what came.

    Example:
        >>> length_from(2048)
        2048
    """
    if isinstance(spec, bool) or not isinstance(spec, int):
        raise TypeError(f"{name} must be an int, the training length, got {spec!r}")
    if spec < 1:
        raise ValueError(f"{name} must be at least 1, got {spec}")
    return spec
