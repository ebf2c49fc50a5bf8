"""gamma per head."""

import torch
from torch import Tensor


def headwise_gamma(num_heads: int) -> Tensor:
    """One gamma a head, by ALiBi's rule for its slopes: 2^(-8h/H) for h = 1..H where H is a power of two.

    Otherwise the slopes of the power of two below H come first, then every other slope of the power of two above (Press
    et al. 2022, get_slopes). This is "head-wise gamma" of the paper's Table 6.

    Args:
        num_heads: H >= 1.

    Returns:
        float32 (H,), on the CPU.

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
    return torch.tensor(slopes(below) + slopes(2 * below)[0::2][: num_heads - below], dtype=torch.float32)
