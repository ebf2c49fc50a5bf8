"""Shared by the tests on a GPU, or where there is none on the model of its kernels (cuda_model)."""

from typing import Any

import torch
from torch import Tensor

from sm_flex.testing.gradients import Attention, OracleKwargs, assert_matches_eq11

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.bfloat16, torch.float16]


def name_of(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def assert_matches_eq11_with_gamma_fixed(
    fn: Attention, inputs: list[Tensor], oracle_kwargs: OracleKwargs | None = None, **options: Any
) -> None:
    """With a gamma that is not learned, whose log M the kernel works out by itself; then with gamma alone learned."""
    assert_matches_eq11(fn, inputs, oracle_kwargs, constants=["gamma"], **options)
    assert_matches_eq11(fn, inputs, oracle_kwargs, constants=["q", "k", "v"], **options)
