"""varlen_attn on a GPU: packed documents, windows, a cache, and the positions that the kernel finds by itself."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest

from sm_flex import stablemask, varlen_attn
from sm_flex.testing import assert_matches_eq11
from sm_flex.testing.gradients import Attention
from tests.helpers.gpu import DEVICE, HALF, assert_matches_eq11_with_gamma_fixed, name_of
from tests.helpers.problems import documents, gamma_of, packed, qkv, unpacked

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_tile")]
LENGTHS = [3, 0, 149, 1, 46]


def varlen_with_lse(cu: Tensor, longest: int, window: int = -1, **kwargs: Any) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor | None]:
        result = varlen_attn(
            packed(q), packed(k), packed(v), cu, cu, longest, longest, window_size=(window, 0), enable_gqa=True,
            return_aux=AuxRequest(lse=True), score_mod=stablemask(gamma, **kwargs),
        )  # fmt: skip
        assert isinstance(result, tuple)
        return unpacked(result[0]), result[1].unsqueeze(0)

    return run


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=name_of)
@pytest.mark.parametrize(("window", "dim"), [(-1, 64), (-1, 60), (0, 64), (5, 128), (50, 40)])
def test_varlen_is_documents_one_by_one(dtype: torch.dtype, window: int, dim: int):
    """Packed documents, one of them empty and one of length 1. float32 has no packed kernel and is dense."""
    cu, ids, positions = documents(LENGTHS, DEVICE)
    i = torch.arange(199, device=DEVICE)
    visible = ids.unsqueeze(1) == ids
    if window >= 0:
        visible = visible & (i.unsqueeze(1) - i <= window)
    inputs = [*qkv(1, 6, 2, 199, 199, dim, dtype, DEVICE), gamma_of(6, dtype, DEVICE)]
    run = varlen_with_lse(cu, 149, window, length=140)
    for check in (assert_matches_eq11, assert_matches_eq11_with_gamma_fixed):
        for with_lse_grad in (False, True):
            check(
                run,
                inputs,
                {"length": 140, "positions": positions, "visible": visible},
                with_lse_grad=with_lse_grad,
            )


@pytest.mark.parametrize("lengths", [LENGTHS, [199], [0, 199], [1] * 199, [100, 99, 0]], ids=len)
def test_varlen_finds_the_position_in_the_document(lengths: list[int]):
    """Left out, positions are those given by hand, to the last bit."""
    cu, _, positions = documents(lengths, DEVICE)
    q, k, v = qkv(1, 6, 2, 199, 199, 64, torch.bfloat16, DEVICE)
    gamma = gamma_of(6, torch.bfloat16, DEVICE)
    found = varlen_with_lse(cu, max(lengths), length=140)(q, k, v, gamma)
    given = varlen_with_lse(cu, max(lengths), length=140, positions=positions)(q, k, v, gamma)
    for a, b in zip(found, given, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
    elsewhere = varlen_with_lse(cu, max(lengths), length=140, positions=positions + 1)(q, k, v, gamma)[1]
    assert elsewhere is not None
    assert not torch.equal(elsewhere, found[1])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("window", [-1, 4])
def test_varlen_decodes_against_a_cache(learned: bool, window: int):
    """Each document's queries sit at the end of its keys; one has more queries than keys, so its first rows are fully masked."""
    q_lengths, k_lengths = [2, 1, 5, 130], [7, 1, 3, 140]
    cu_q, q_ids, q_rows = documents(q_lengths, DEVICE)
    cu_k, k_ids, k_rows = documents(k_lengths, DEVICE)
    shift = (torch.tensor(k_lengths) - torch.tensor(q_lengths)).to(DEVICE)[q_ids]
    positions = q_rows + shift.clamp(min=0)
    # Slots of a document are aligned to the end of its keys; those of all packed rows, which the oracle adds, hide no more.
    slot = (q_rows + shift).unsqueeze(1)
    visible = (q_ids.unsqueeze(1) == k_ids) & (k_rows <= slot)
    if window >= 0:
        visible = visible & (k_rows >= slot - window)

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor | None]:
        out, lse = varlen_attn(
            packed(q), packed(k), packed(v), cu_q, cu_k, 130, 140, window_size=(window, 0), enable_gqa=True,
            return_aux=AuxRequest(lse=True), score_mod=stablemask(gamma, length=150, positions=positions),
        )  # fmt: skip
        return unpacked(out), lse.unsqueeze(0)

    for dtype in (*HALF, torch.float32):
        inputs = [*qkv(1, 6, 2, sum(q_lengths), sum(k_lengths), 64, dtype, DEVICE), gamma_of(6, dtype, DEVICE)]
        kwargs = {"length": 150, "positions": positions, "visible": visible}
        check = assert_matches_eq11 if learned else assert_matches_eq11_with_gamma_fixed
        check(run, inputs, kwargs)
