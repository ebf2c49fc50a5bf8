"""varlen_attn on a CPU: packed documents, windows, a cache, and the dense engine."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest

from sm_flex import stablemask, varlen_attn
from sm_flex.testing import assert_matches_eq11, oracle
from tests.helpers.problems import DTYPES, documents, gamma_of, packed, qkv, unpacked


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [-1, 0, 5, 50])
def test_varlen_is_documents_one_by_one(dtype: torch.dtype, window: int, monkeypatch: pytest.MonkeyPatch):
    """Packed documents with windows, an empty document and one longer than several blocks of the window."""
    import sm_flex.engines.varlen_cpu as varlen_cpu

    monkeypatch.setattr(varlen_cpu, "BLOCK", 32)
    lengths = [3, 0, 75, 1, 46]
    total = sum(lengths)
    cu, ids, positions = documents(lengths)
    i = torch.arange(total)
    visible = ids.unsqueeze(1) == ids
    if window >= 0:
        visible = visible & (i.unsqueeze(1) - i <= window)

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = varlen_attn(
            packed(q), packed(k), packed(v), cu, cu, 75, 75, window_size=(window, 0), enable_gqa=True,
            return_aux=AuxRequest(lse=True), score_mod=stablemask(gamma, length=80),
        )  # fmt: skip
        return unpacked(out), lse.unsqueeze(0)

    inputs = [*qkv(1, 2, 1, total, total, 8, dtype), gamma_of(2, dtype)]
    assert_matches_eq11(run, inputs, {"length": 80, "positions": positions, "visible": visible}, with_lse_grad=window == 5)


def test_varlen_decodes_against_a_cache():
    """Each document's queries sit at the end of its keys; one has more queries than keys, so its first rows are fully masked."""
    q_lengths, k_lengths = [2, 1, 5, 3], [7, 1, 3, 40]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (q_lengths, k_lengths))
    positions = torch.cat([torch.arange(max(b - a, 0), max(b - a, 0) + a) for a, b in zip(q_lengths, k_lengths, strict=True)])
    q, k, v = qkv(1, 2, 1, sum(q_lengths), sum(k_lengths), 8)
    for window in (-1, 4):
        out = varlen_attn(
            packed(q), packed(k), packed(v), cu_q, cu_k, 5, 40, window_size=(window, 0), enable_gqa=True,
            score_mod=stablemask(0.2, length=50, positions=positions),
        )  # fmt: skip
        for n in range(4):
            rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
            s, t = q_lengths[n], k_lengths[n]
            slot = torch.arange(s).unsqueeze(1) + t - s
            visible = torch.arange(t) >= slot - window if window >= 0 else None
            reference, _ = oracle(
                q[:, :, rows], k[:, :, keys], v[:, :, keys],
                gamma=0.2, length=50, positions=positions[rows], visible=visible,
            )  # fmt: skip
            torch.testing.assert_close(out[rows], packed(reference))


def test_varlen_dense_engine_agrees(monkeypatch: pytest.MonkeyPatch):
    """The mask of packed documents that serves devices and dtypes without a varlen kernel."""
    from sm_flex.engines import choose

    cu_q, cu_k = torch.tensor([0, 4, 4, 9]).int(), torch.tensor([0, 6, 8, 13]).int()
    positions = torch.arange(9)
    q, k, v = (packed(x) for x in qkv(1, 2, 1, 9, 13, 8))

    def run() -> Tensor:
        out = varlen_attn(
            q, k, v, cu_q, cu_k, 5, 6, window_size=(3, 0), enable_gqa=True,
            score_mod=stablemask(0.2, length=50, positions=positions),
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    expected = run()
    monkeypatch.setattr(choose, "candidates", lambda need: ["dense"])
    torch.testing.assert_close(run(), expected)
