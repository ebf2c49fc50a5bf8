"""What the diagnostics say is eq. 11: maps and shares against the oracle, whose values are unit vectors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from sm_flex import flex_attention, scaled_dot_product_attention, stablemask, varlen_attn
from sm_flex.diagnostics import attention_map, first_token_share, real_share
from sm_flex.engines import dense
from sm_flex.testing import oracle
from sm_flex.testing.tolerance import assert_within
from tests.helpers.problems import DTYPES, alibi, alibi_bias, packed, qkv, unpacked

GAMMA = torch.linspace(0.02, 0.9, 6).double()


def unit_values(k: Tensor) -> Tensor:
    """(B, Hkv, T, T): the output of an attention to unit vectors is its matrix."""
    return torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:3], -1)


def matrix(q: Tensor, k: Tensor, **kwargs: Any) -> Tensor:
    """softmax(A_SM) o C of eq. 11 in float64, (B, H, S, T)."""
    q, k = q.double(), k.double()
    return oracle(q, k, unit_values(k), **kwargs)[0]


DISTANCE = torch.arange(13).unsqueeze(1) - torch.arange(13)
BIAS = alibi_bias(6, 13)
EACH = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [0, 1, 2, 0, 1, 0, 900, 3, 4, 5, 6, 7, 8]])
# name: S, T, arguments of stablemask, arguments of the diagnostics, arguments of the oracle
PROBLEMS: dict[str, tuple[int, int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "square": (13, 13, {"length": 13}, {}, {}),
    "without a length": (13, 13, {}, {}, {}),
    "one row": (1, 1, {"length": 9}, {}, {"length": 9}),
    "below the length": (13, 13, {"length": 100}, {}, {"length": 100}),
    "beyond the length": (13, 13, {"length": 5}, {}, {"length": 5}),
    "scale": (13, 13, {"length": 20}, {"scale": -0.7}, {"length": 20, "scale": -0.7}),
    "inner": (13, 13, {"length": 20, "score_mod": alibi}, {}, {"length": 20, "bias": BIAS}),
    "positions": (13, 13, {"length": 9, "positions": EACH}, {}, {"length": 9, "positions": EACH}),
    "step": (1, 11, {"length": 20, "positions": torch.tensor([10])}, {}, {"length": 20, "positions": torch.tensor([10])}),
    "chunk": (5, 17, {"length": 20, "positions": torch.arange(12, 17)}, {}, {"length": 20, "positions": torch.arange(12, 17)}),
    "fully masked rows": (11, 4, {"length": 9, "positions": torch.arange(11)}, {}, {"length": 9, "positions": torch.arange(11)}),
}
for _shape in [(13, 13), (1, 13), (6, 1, 13), (2, 1, 1, 13), (2, 6, 13, 13), (13,)]:
    _visible = torch.rand(_shape, generator=torch.Generator().manual_seed(3)) > 0.4
    PROBLEMS[f"visible {_shape}"] = (13, 13, {"length": 13}, {"visible": _visible}, {"visible": _visible})
_blocks = create_block_mask(lambda b, h, i, j: i - j < 4 + h, 1, 6, 13, 13, device="cpu", BLOCK_SIZE=4)
_window = (DISTANCE - torch.arange(6).reshape(6, 1, 1) < 4).unsqueeze(0)
PROBLEMS["block mask"] = (13, 13, {"length": 30}, {"visible": _blocks}, {"visible": _window, "length": 30})


@pytest.mark.parametrize("rows", [None, 1], ids=["one block", "blocks"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_equation_11(name: str, rows: int | None, monkeypatch: pytest.MonkeyPatch):
    """The matrix, its rows' sums, and its column of first tokens; in one block, and in blocks of a row."""
    if rows is not None:
        monkeypatch.setattr(dense, "BLOCK_SCORES", 1)
        monkeypatch.setattr(dense, "MIN_ROWS", rows)
    num_queries, num_keys, mask_kwargs, kwargs, oracle_kwargs = PROBLEMS[name]
    q, k, _ = qkv(2, 6, 3, num_queries, num_keys, 8)
    mask = stablemask(GAMMA, **mask_kwargs)
    reference = matrix(q, k, gamma=GAMMA, **oracle_kwargs)
    found = attention_map(q, k, mask, **kwargs)
    assert found.dtype == torch.float64
    assert_within(found, reference, 1e-10, "map")
    assert found.triu(num_keys - num_queries + 1).abs().max() == 0
    assert_within(real_share(q, k, mask, **kwargs), reference.sum(-1), 1e-10, "real share")
    key_positions = torch.arange(num_keys) if num_queries != num_keys else None
    first = torch.zeros(2, 1, 1, num_keys, dtype=torch.float64)
    first[..., 0] = 1
    if name == "positions":
        first = (EACH == 0).double().reshape(2, 1, 1, 13)
    share = first_token_share(q, k, mask, key_positions=key_positions, **kwargs)
    assert_within(share, (reference * first).sum(-1), 1e-10, "first token")


@pytest.mark.parametrize("mask", [None, stablemask(math.inf, length=13), stablemask(0.0, length=1)])
def test_no_mass_is_plain_causal_attention(mask: Any):
    """None, gamma = inf; and beyond the length a mass of one score, which is not."""
    q, k, _ = qkv(2, 6, 3, 13, 13, 8)
    plain = matrix(q, k, gamma=math.inf)
    found = attention_map(q, k, mask)
    if mask is not None and mask.length == 1:
        assert (found[:, :, 1:].sum(-1) < 1).all()
        return
    assert_within(found, plain, 1e-10)
    assert_within(real_share(q, k, mask), torch.ones(2, 6, 13).double(), 1e-10)
    assert_within(first_token_share(q, k, mask), plain[..., 0], 1e-10)


def test_none_takes_a_chunk():
    q, k, _ = qkv(1, 2, 2, 3, 7, 8)
    reference = matrix(q, k, gamma=math.inf, positions=torch.arange(4, 7))
    assert_within(attention_map(q, k, None), reference, 1e-10)
    assert_within(first_token_share(q, k, None, key_positions=torch.arange(7)), reference[..., 0], 1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_inputs_give_float32(dtype: torch.dtype):
    q, k, _ = qkv(2, 6, 3, 33, 33, 16, dtype)
    gamma = GAMMA.to(torch.promote_types(dtype, torch.float32))
    mask = stablemask(gamma, length=64)
    reference = matrix(q, k, gamma=gamma.double(), length=64)
    for found, expected in (
        (attention_map(q, k, mask), reference),
        (first_token_share(q, k, mask), reference[..., 0]),
        (real_share(q, k, mask), reference.sum(-1)),
    ):
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_within(found, expected, 1e-10 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("inner", [None, alibi])
def test_unit_values_through_the_drop_ins_give_the_map(inner: Any):
    q, k, _ = qkv(2, 6, 3, 13, 13, 13)
    mask = stablemask(GAMMA, length=20, score_mod=inner)
    found = attention_map(q, k, mask)
    torch.testing.assert_close(flex_attention(q, k, unit_values(k), score_mod=mask, enable_gqa=True), found)
    seen = torch.rand(13, 13) > 0.3
    masked = scaled_dot_product_attention(q, k, unit_values(k), attn_mask=seen, enable_gqa=True, score_mod=mask)
    torch.testing.assert_close(masked, attention_map(q, k, mask, visible=seen))


@pytest.mark.parametrize("shape", [(), (6,), (2, 6, 13)])
def test_a_sink_takes_its_share(shape: tuple[int, ...]):
    """e^sink more in every row: with V of ones the drop-in's output is the real share, and a learned sink keeps no gradient."""
    q, k, _ = qkv(2, 6, 3, 13, 13, 13)
    sink = torch.randn(shape).double().requires_grad_()
    mask = stablemask(GAMMA, length=20, sink=sink)
    found = attention_map(q, k, mask)
    assert not found.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(flex_attention(q, k, unit_values(k), score_mod=mask, enable_gqa=True), found)
    torch.testing.assert_close(real_share(q, k, mask), found.sum(-1))
    torch.testing.assert_close(first_token_share(q, k, mask), found[..., 0])
    assert (found.sum(-1) < attention_map(q, k, stablemask(GAMMA, length=20)).sum(-1)).all()


CU = torch.tensor([0, 5, 5, 6, 13], dtype=torch.int32)


def test_packed_documents():
    """Documents apart, positions that restart, and each row's own first token; as varlen_attn, and one by one."""
    q, k, _ = qkv(1, 6, 3, 13, 13, 13)
    mask = stablemask(GAMMA, length=9)
    found = attention_map(q, k, mask, cu_seqlens=CU)
    q_thd, k_thd, v_thd = (packed(x) for x in (q, k, unit_values(k)))
    out = varlen_attn(q_thd, k_thd, v_thd, CU, CU, 7, 7, window_size=(-1, 0), enable_gqa=True, score_mod=mask)
    assert isinstance(out, Tensor)
    torch.testing.assert_close(unpacked(out), found)
    first = first_token_share(q, k, mask, cu_seqlens=CU)
    share = real_share(q, k, mask, cu_seqlens=CU)
    for start, end in ((0, 5), (5, 6), (6, 13)):
        alone = matrix(q[:, :, start:end], k[:, :, start:end], gamma=GAMMA, length=9)
        assert_within(found[:, :, start:end, start:end], alone, 1e-10)
        assert_within(first[:, :, start:end], alone[..., 0], 1e-10)
        assert_within(share[:, :, start:end], alone.sum(-1), 1e-10)
    apart = torch.block_diag(torch.ones(5, 5), torch.ones(1, 1), torch.ones(7, 7)) == 0
    assert found[..., apart].abs().max() == 0
    plain = attention_map(q, k, None, cu_seqlens=CU)
    torch.testing.assert_close(plain.sum(-1), torch.ones(1, 6, 13).double())
    assert plain[..., apart].abs().max() == 0


def test_packed_documents_within_a_window_and_with_positions_of_their_own():
    q, k, _ = qkv(1, 6, 3, 13, 13, 8)
    restarts = torch.tensor([0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5, 6])
    window = DISTANCE < 3
    together = attention_map(q, k, stablemask(GAMMA, length=9), cu_seqlens=CU, visible=window)
    apart = torch.block_diag(torch.ones(5, 5), torch.ones(1, 1), torch.ones(7, 7)) == 1
    assert_within(together, matrix(q, k, gamma=GAMMA, length=9, positions=restarts, visible=window & apart), 1e-10)
    mask = stablemask(GAMMA, length=9, positions=restarts + 2)
    later = matrix(q, k, gamma=GAMMA, length=9, positions=restarts + 2, visible=apart)
    assert_within(attention_map(q, k, mask, cu_seqlens=CU), later, 1e-10)
    # cu_seqlens say where documents start, whatever the mass goes by.
    first = (later * (restarts == 0)).sum(-1)
    assert first[0, 0, 2] > 0
    assert_within(first_token_share(q, k, mask, cu_seqlens=CU), first, 1e-10)


def test_first_token_of_left_padded_rows_and_of_a_trimmed_cache():
    q, k, _ = qkv(2, 6, 3, 7, 7, 8)
    keep = torch.tensor([[True] * 7, [False] * 3 + [True] * 4])
    positions = (keep.cumsum(-1) - 1).clamp(min=0)
    mask = stablemask(GAMMA, length=9, positions=positions)
    visible = keep[:, None, None, :]
    reference = matrix(q, k, gamma=GAMMA, length=9, positions=positions, visible=visible)
    share = first_token_share(q, k, mask, visible=visible)
    assert_within(share[0], reference[0, ..., 0], 1e-10)
    assert_within(share[1], reference[1, ..., 3], 1e-10)
    assert share[1, :, :3].abs().max() == 0
    # Only the most recent keys are kept: the first token is not among them, and artificial keys are no tokens.
    mask = stablemask(GAMMA, length=9, positions=torch.arange(103, 107))
    assert first_token_share(q[:, :, :4], k, mask, key_positions=torch.arange(100, 107)).abs().max() == 0
    prefixed = first_token_share(q[:, :, :4], k, mask, key_positions=torch.arange(-1, 6))
    reference = matrix(q[:, :, :4], k, gamma=GAMMA, length=9, positions=torch.arange(103, 107))
    assert_within(prefixed, reference[..., 1], 1e-10)


def test_the_future_does_not_matter_and_the_past_does():
    q, k, _ = qkv(1, 2, 2, 13, 13, 8)
    mask = stablemask(0.1, length=20)
    changed = k.clone()
    changed[:, :, 9] += 1
    before, after = (attention_map(q, x, mask) for x in (k, changed))
    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert (before[:, :, 9:] != after[:, :, 9:]).any(-1).all()


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_shares_hold_no_matrix(monkeypatch: pytest.MonkeyPatch):
    """Blocks of rows only: a map is 1 x 2 x 512 x 512, the shares never make a tensor of a tenth of that."""
    monkeypatch.setattr(dense, "BLOCK_SCORES", 1 << 15)
    q, k, _ = qkv(1, 2, 1, 512, 512, 8, torch.float32)
    mask, cu = stablemask(0.1, length=512), torch.tensor([0, 200, 512], dtype=torch.int32)
    full = 2 * 512 * 512

    def largest(call: Callable[[], Tensor]) -> int:
        with Largest() as mode:
            call()
        return mode.elements

    assert largest(lambda: attention_map(q, k, mask)) == full
    for share in (first_token_share, real_share):
        assert 512 * 8 < largest(lambda share=share: share(q, k, mask)) < full // 10
        assert largest(lambda share=share: share(q, k, mask, cu_seqlens=cu)) < full // 10


def test_no_gradient_is_kept():
    q, k, _ = (x.requires_grad_() for x in qkv(1, 2, 2, 5, 5, 8))
    mask = stablemask(torch.tensor(0.1, requires_grad=True), length=5)
    for found in (attention_map(q, k, mask), first_token_share(q, k, mask), real_share(q, k, mask)):
        assert not found.requires_grad
    assert torch.is_grad_enabled()


def test_autocast_sees_what_the_attention_sees():
    """The drop-ins round queries and keys to the dtype of autocast, and so does the map; nothing else is rounded."""
    q, k, _ = qkv(1, 2, 2, 9, 9, 8, torch.float32)
    mask = stablemask(0.1, length=9)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_map(q, k, mask)
    assert torch.equal(found, attention_map(q.bfloat16(), k.bfloat16(), mask))
    assert not torch.equal(found, attention_map(q, k, mask))


@pytest.mark.parametrize(("batch", "rows"), [(0, 5), (2, 0)])
def test_empty(batch: int, rows: int):
    q, k, _ = qkv(batch, 4, 2, rows, rows, 8)
    mask = stablemask(0.1, length=9)
    assert attention_map(q, k, mask).shape == (batch, 4, rows, rows)
    assert first_token_share(q, k, mask).shape == real_share(q, k, mask).shape == (batch, 4, rows)
