"""Shared by the tests on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from sm_flex import flex_attention, stablemask
from sm_flex.engines import autograd
from tests.helpers.problems import Attention

DEVICE = "cuda"
HALF = [torch.bfloat16, torch.float16]


def name_of(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def fixed(run: Attention) -> Attention:
    """run with a gamma that is not learned, whose log M the kernel works out by itself; d gamma comes from a second call."""

    def both(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor | None]:
        out, lse = run(q, k, v, gamma.detach())
        learned_out, learned_lse = run(q.detach(), k.detach(), v.detach(), gamma)
        assert lse is not None
        assert learned_lse is not None
        return out + (learned_out - learned_out.detach()), lse + (learned_lse - learned_lse.detach())

    return both


def flex_with_lse(backend: str, **kwargs: Any) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor | None]:
        # A 0-d gamma that is not learned goes in as the number it is.
        rate = gamma.item() if gamma.dim() == 0 and not gamma.requires_grad else gamma
        out, aux = flex_attention(
            q, k, v, score_mod=stablemask(rate, **kwargs), enable_gqa=True,
            kernel_options={"BACKEND": backend}, return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        return out, aux.lse

    return run


def gamma_of(heads: int, dtype: torch.dtype) -> Tensor:
    return torch.linspace(0.02, 0.9, heads).to(DEVICE, dtype if dtype == torch.float64 else torch.float32)


@contextmanager
def engines_used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The engines that autograd.attend was given; dense and flex do without it."""
    names: list[str] = []
    attend = autograd.attend
    with monkeypatch.context() as patch:
        patch.setattr(autograd, "attend", lambda engine, *args, **kw: names.append(engine) or attend(engine, *args, **kw))
        yield names


def packed(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)


def documents(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """cu_seqlens, the document of each row, and its position there."""
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return cu.to(DEVICE), ids.to(DEVICE), positions.to(DEVICE)
