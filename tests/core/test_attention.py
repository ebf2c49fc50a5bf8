"""Every CPU engine against the oracle: out, lse, dq, dk, dv, d gamma, and the gradient through lse."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, and_masks, create_block_mask
from torch.nn.attention.varlen import AuxRequest as VarlenAux

from sm_flex import flex_attention, scaled_dot_product_attention, stablemask, varlen_attn
from sm_flex.diagnostics import attention_map
from sm_flex.testing import oracle
from tests.helpers.problems import check, gradients, qkv

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["FLASH_ATTENTION", "MATH"]


def flex_with_lse(backend: str = "AUTO", block_mask: BlockMask | None = None, **kwargs):
    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, *extra: Tensor):
        out, aux = flex_attention(
            q, k, v, score_mod=stablemask(gamma, **kwargs), enable_gqa=True, block_mask=block_mask,
            kernel_options={"BACKEND": backend}, return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        return out, aux.lse

    return run


def gamma_of(heads: int, dtype: torch.dtype) -> Tensor:
    return torch.linspace(0.02, 0.9, heads).to(dtype if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_rows", [1, 2, 13, 128, 131])
def test_square(backend: str, dtype: torch.dtype, num_rows: int):
    inputs = [*qkv(2, 6, 3, num_rows, num_rows, 16, dtype), gamma_of(6, dtype)]
    check(flex_with_lse(backend, length=100), inputs, lambda: {"length": 100})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_through_lse(backend: str, dtype: torch.dtype):
    inputs = [*qkv(2, 6, 2, 29, 29, 24, dtype), gamma_of(6, dtype)]
    check(flex_with_lse(backend, length=64), inputs, lambda: {"length": 64}, with_lse_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 7, 18, 19, 20, 1000])
def test_lengths_below_at_and_beyond(backend: str, length: int):
    inputs = [*qkv(1, 2, 1, 19, 19, 5), gamma_of(2, torch.float64)]
    check(flex_with_lse(backend, length=length), inputs, lambda: {"length": length}, with_lse_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [0.0, 1e-8, 0.5, 30.0])
def test_learned_scalar_gamma(backend: str, gamma: float):
    check(flex_with_lse(backend), [*qkv(2, 3, 3, 23, 23, 7), torch.tensor(gamma).double()], with_lse_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [1e4, math.inf])
def test_no_mass_left_is_causal_attention(backend: str, gamma: float):
    q, k, v = qkv(2, 3, 3, 23, 23, 8)
    out = flex_attention(q, k, v, score_mod=stablemask(gamma), kernel_options={"BACKEND": backend})
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 11), (5, 17), (64, 130)])
def test_decode_chunk(backend: str, dtype: torch.dtype, num_queries: int, num_keys: int):
    positions = torch.arange(num_keys - num_queries, num_keys)
    inputs = [*qkv(2, 4, 2, num_queries, num_keys, 8, dtype), gamma_of(4, dtype)]
    check(flex_with_lse(backend, length=150, positions=positions), inputs, lambda: {"length": 150, "positions": positions})


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_queries_than_keys_leaves_dead_rows(backend: str):
    """Rows that see no key: output 0, finite gradients, lse' = log M."""
    positions = torch.arange(11)
    inputs = [*qkv(1, 2, 2, 11, 4, 8), gamma_of(2, torch.float64)]
    check(
        flex_with_lse(backend, length=9, positions=positions),
        inputs,
        lambda: {"length": 9, "positions": positions},
        with_lse_grad=True,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_of_each_row_of_the_batch(backend: str):
    positions = torch.tensor([[0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 0, 900]])
    inputs = [*qkv(2, 4, 2, 7, 7, 8), gamma_of(4, torch.float64)]
    kwargs = {"length": 8, "positions": positions}
    check(flex_with_lse(backend, **kwargs), inputs, lambda: kwargs)


def sdpa(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, attn_mask: Tensor, **kwargs):
    out = scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, enable_gqa=True, score_mod=stablemask(gamma, **kwargs))
    return out, None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("shape", [(13, 13), (1, 13), (6, 1, 13), (2, 1, 1, 13), (2, 6, 13, 13), (13,)])
def test_boolean_mask(dtype: torch.dtype, kernel: SDPBackend, shape: tuple[int, ...]):
    attn_mask = torch.rand(shape) > 0.4
    attn_mask[..., 0] = False  # row 0 is dead
    inputs = [*qkv(2, 6, 3, 13, 13, 8, dtype), gamma_of(6, dtype), attn_mask]
    with sdpa_kernel(kernel):
        check(sdpa, inputs, lambda m: {"visible": m, "length": 13})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(13, 13), (1, 13), (2, 1, 1, 13), (1, 6, 13, 13)])
def test_float_mask_gets_its_gradient(dtype: torch.dtype, shape: tuple[int, ...]):
    inputs = [*qkv(2, 6, 3, 13, 13, 8, dtype), gamma_of(6, dtype), torch.randn(shape).to(dtype)]
    check(sdpa, inputs, lambda bias: {"bias": bias, "length": 13})


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_float_mask_with_infinities_and_without_mass(kernel: SDPBackend):
    """A fully masked row whose log M is -inf as well: output 0 and gradients 0, not NaN."""
    bias = torch.zeros(9, 9, dtype=torch.float64)
    bias[[0, 4, 8]] = -math.inf
    gamma = torch.tensor([0.5, math.inf]).double()
    grad_out = torch.randn(1, 2, 9, 8, dtype=torch.float64)
    inputs = qkv(1, 2, 2, 9, 9, 8)
    with sdpa_kernel(kernel):
        actual = gradients(lambda q, k, v: sdpa(q, k, v, gamma, bias, length=9), inputs, grad_out, None)
    reference = gradients(lambda q, k, v: (oracle(q, k, v, gamma=gamma, bias=bias)[0], None), inputs, grad_out, None)
    assert actual[0][0, 1, 4].abs().max() == 0
    for a, b in zip(actual, reference, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_static_cache_with_unused_slots(kernel: SDPBackend):
    """5 queries at positions 6..10 of a cache of 32 slots: the mask says which slots are used, positions feed the mass."""
    q, k, v = qkv(2, 4, 2, 5, 32, 8)
    positions = torch.arange(6, 11)
    attn_mask = torch.arange(32) <= positions.unsqueeze(1)
    gamma = gamma_of(4, torch.float64)
    with sdpa_kernel(kernel):
        out = sdpa(q, k, v, gamma, attn_mask, length=16, positions=positions)[0]
    reference, _ = oracle(q, k[:, :, :11], v[:, :, :11], gamma=gamma, length=16, positions=positions)
    torch.testing.assert_close(out, reference)


def test_causal_flag_and_scale_and_value_dim():
    """A value dim of its own (dense), a scale, and a non-contiguous layout."""
    q, k, v = qkv(2, 4, 2, 13, 13, 8, v_dim=5)
    for scale in (0.7, -0.3):
        out = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True, score_mod=stablemask(0.3, length=20)
        )
        torch.testing.assert_close(out, oracle(q, k, v, gamma=0.3, length=20, scale=scale)[0])
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).mT.contiguous().mT for x in qkv(2, 4, 4, 13, 13, 8))
    assert q.stride(-1) != 1
    out = scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=stablemask(0.3))
    torch.testing.assert_close(out, oracle(q, k, v, gamma=0.3)[0])


@pytest.mark.parametrize(("batch", "rows"), [(0, 5), (2, 0)])
def test_empty(batch: int, rows: int):
    q, k, v = (x.requires_grad_() for x in qkv(batch, 4, 2, rows, rows, 8))
    out, aux = flex_attention(q, k, v, score_mod=stablemask(0.3, length=9), enable_gqa=True, return_aux=AuxRequest(lse=True))
    out.sum().backward()
    assert out.shape == (batch, 4, rows, 8)
    assert aux.lse is not None
    assert aux.lse.shape == (batch, 4, rows)
    assert q.grad is not None
    assert q.grad.shape == q.shape


def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score - 2.0 ** -(h + 1.0) * (q_idx - kv_idx)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inner_score_mod(dtype: torch.dtype):
    distance = torch.arange(29).unsqueeze(1) - torch.arange(29)
    bias = -(2.0 ** -(torch.arange(6) + 1.0)).reshape(1, 6, 1, 1) * distance
    inputs = [*qkv(2, 6, 3, 29, 29, 8, dtype), gamma_of(6, dtype)]
    check(flex_with_lse(length=40, score_mod=alibi), inputs, lambda: {"length": 40, "bias": bias}, with_lse_grad=True)


def test_tensor_captured_by_an_inner_score_mod_gets_its_gradient(monkeypatch: pytest.MonkeyPatch):
    """Through several blocks of rows, each computed again in the backward; b and h index one after the other."""
    import sm_flex.engines.dense as dense

    monkeypatch.setattr(dense, "BLOCK_SCORES", 1)
    inputs = [*qkv(1, 4, 2, 70, 70, 8), gamma_of(4, torch.float64), torch.randn(1, 4, dtype=torch.float64)]

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, table: Tensor):
        def inner(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score * table[b][h]

        return flex_attention(q, k, v, score_mod=stablemask(gamma, score_mod=inner), enable_gqa=True), None

    def reference(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, table: Tensor):
        return oracle(q * table.reshape(1, 4, 1, 1), k, v, gamma=gamma)[0], None

    grad_out = torch.randn(1, 4, 70, 8, dtype=torch.float64)
    expected = gradients(reference, inputs, grad_out, None)
    for a, b in zip(gradients(run, inputs, grad_out, None), expected, strict=True):
        torch.testing.assert_close(a, b)


def document_mask(lengths: list[int]):
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ids[q_idx] == ids[kv_idx]

    return mask_mod, ids


def window_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx - kv_idx <= 40


@pytest.mark.parametrize("block_size", [16, 128])
def test_block_mask_of_documents_and_window(block_size: int):
    lengths = [3, 150, 1, 46]
    total = sum(lengths)
    documents, ids = document_mask(lengths)
    block_mask = create_block_mask(
        and_masks(documents, window_mask), None, None, total, total, device="cpu", BLOCK_SIZE=block_size
    )
    positions = torch.cat([torch.arange(n) for n in lengths])
    i = torch.arange(total)
    visible = (ids.unsqueeze(1) == ids) & (i.unsqueeze(1) - i <= 40)
    inputs = [*qkv(2, 4, 2, total, total, 8), gamma_of(4, torch.float64)]
    kwargs = {"length": 160, "positions": positions}
    check(flex_with_lse(block_mask=block_mask, **kwargs), inputs, lambda: {**kwargs, "visible": visible})


def test_block_mask_that_is_not_causal_is_narrowed():
    """A full BlockMask opens no future key; one built from block lists hides what it does not list."""
    q, k, v = qkv(1, 2, 2, 48, 48, 8)
    everything = create_block_mask(lambda b, h, i, j: i >= 0, None, None, 48, 48, device="cpu", BLOCK_SIZE=16)
    out = flex_attention(q, k, v, score_mod=stablemask(0.3), block_mask=everything)
    torch.testing.assert_close(out, oracle(q, k, v, gamma=0.3)[0])
    # Block row r lists only block r as full, so nothing outside the diagonal blocks is seen.
    ones, order = torch.ones(1, 1, 3, dtype=torch.int32), torch.tensor([[[[0, 1, 2], [1, 0, 2], [2, 0, 1]]]]).int()
    diagonal = BlockMask.from_kv_blocks(0 * ones, order, ones, order, BLOCK_SIZE=16)
    out = flex_attention(q, k, v, score_mod=stablemask(0.3), block_mask=diagonal)
    blocks = torch.arange(48) // 16
    torch.testing.assert_close(out, oracle(q, k, v, gamma=0.3, visible=blocks.unsqueeze(1) == blocks)[0])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_balanced_shard_of_the_queries_and_all_keys_in_its_order(rank: int):
    """Context parallelism with a head-tail balance: slots 0 to T hold chunks 0, 3, 1, 2 of the sequence."""
    lengths, chunk = [13, 30, 21], 16
    total = sum(lengths)
    order = torch.arange(total).reshape(4, chunk)[[0, 3, 1, 2]].flatten()
    mine = order[rank * 2 * chunk : (rank + 1) * 2 * chunk]
    _, ids = document_mask(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])[mine]
    block_mask = create_block_mask(
        lambda b, h, i, j: (order[j] <= mine[i]) & (ids[order[j]] == ids[mine[i]]),
        None, None, len(mine), total, device="cpu", BLOCK_SIZE=16,
    )  # fmt: skip
    _, k, v = qkv(2, 4, 2, total, total, 8)
    whole = [qkv(2, 4, 2, total, total, 8)[0], k, v, gamma_of(4, torch.float64)]
    shard = [whole[0][:, :, mine], k[:, :, order], v[:, :, order], whole[3]]
    options = {"length": 40, "positions": positions, "ordered": False}
    out, lse = flex_with_lse(block_mask=block_mask, **options)(*shard)
    visible = ids.unsqueeze(1) == ids
    packed_positions = torch.cat([torch.arange(n) for n in lengths])
    expected = oracle(*whole[:3], gamma=whole[3], length=40, positions=packed_positions, visible=visible)
    torch.testing.assert_close(out, expected[0][:, :, mine])
    torch.testing.assert_close(lse, expected[1][:, :, mine])
    weights = attention_map(shard[0], shard[1], stablemask(shard[3], **options), visible=block_mask)
    torch.testing.assert_close(weights @ shard[2].repeat_interleave(2, dim=1), out)


def packed(q: Tensor) -> Tensor:
    return q[0].transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [-1, 0, 5, 50])
def test_varlen_is_documents_one_by_one(dtype: torch.dtype, window: int, monkeypatch: pytest.MonkeyPatch):
    """Packed documents with windows, an empty document and one longer than several blocks of the window."""
    import sm_flex.engines.varlen_cpu as varlen_cpu

    monkeypatch.setattr(varlen_cpu, "BLOCK", 32)
    lengths = [3, 0, 75, 1, 46]
    total = sum(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    _, ids = document_mask(lengths)
    i = torch.arange(total)
    visible = ids.unsqueeze(1) == ids
    if window >= 0:
        visible = visible & (i.unsqueeze(1) - i <= window)
    positions = torch.cat([torch.arange(n) for n in lengths])

    def run(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor):
        out, lse = varlen_attn(
            packed(q), packed(k), packed(v), cu, cu, 75, 75, window_size=(window, 0), enable_gqa=True,
            return_aux=VarlenAux(lse=True), score_mod=stablemask(gamma, length=80),
        )  # fmt: skip
        return out.transpose(0, 1).unsqueeze(0), lse.unsqueeze(0)

    inputs = [*qkv(1, 2, 1, total, total, 8, dtype), gamma_of(2, dtype)]
    check(run, inputs, lambda: {"length": 80, "positions": positions, "visible": visible}, with_lse_grad=window == 5)


def test_varlen_decodes_against_a_cache():
    """Each document's queries sit at the end of its keys; one has more queries than keys, so its first rows are dead."""
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


def test_dropout_drops_attention_and_never_the_mass():
    """With values 1 the output is the row's undropped share on average; the mass takes its part whatever is dropped."""
    q, k, _ = qkv(1, 64, 64, 33, 33, 8, torch.float32)
    v = torch.ones(1, 64, 33, 4)
    mask = stablemask(0.05, length=64)
    out = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.5, score_mod=mask)
    share = scaled_dot_product_attention(q, k, v, is_causal=True, score_mod=mask)
    assert not torch.equal(out, share)
    torch.testing.assert_close(out.mean(1), share.mean(1), atol=0.2, rtol=0)
    # Row 0 has one real score: it is dropped, or doubled.
    ratio = (out / share)[0, :, 0, 0]
    assert torch.all((ratio.abs() < 1e-6) | ((ratio - 2).abs() < 1e-5))
    assert 0 < (ratio < 1).sum() < 64


def test_dropout_gradient_uses_the_same_draw(monkeypatch: pytest.MonkeyPatch):
    """Blocks computed again in the backward must drop what they dropped."""
    import sm_flex.engines.dense as dense

    monkeypatch.setattr(dense, "BLOCK_SCORES", 1)
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 2, 70, 70, 4))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.3, score_mod=stablemask(0.1))
    (dv,) = torch.autograd.grad(out.sum(), v)
    # out is linear in v: <out, 1> = <dv, v> for the same draw.
    torch.testing.assert_close((dv * v).sum(), out.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_as_sdpa(dtype: torch.dtype):
    q, k, v = qkv(2, 4, 4, 13, 13, 8, torch.float32)
    mask = torch.zeros(13, 13)
    with torch.autocast("cpu", dtype):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).dtype
        out = flex_attention(q, k, v, score_mod=stablemask(0.3))
        assert isinstance(out, Tensor)
        masked = scaled_dot_product_attention(q, k, v, attn_mask=mask, score_mod=stablemask(0.3))
        dense = flex_attention(q, k, v, score_mod=stablemask(0.3, score_mod=alibi))
        assert isinstance(dense, Tensor)
        mixed = flex_attention(q, k.to(dtype), v, score_mod=stablemask(0.3))
        assert isinstance(mixed, Tensor)
        wide = flex_attention(q.double(), k.double(), v.double(), score_mod=stablemask(0.3))
        assert isinstance(wide, Tensor)
    assert out.dtype == masked.dtype == dense.dtype == expected == dtype
    assert wide.dtype == torch.float64
    direct = flex_attention(q.to(dtype), k.to(dtype), v.to(dtype), score_mod=stablemask(0.3))
    assert isinstance(direct, Tensor)
    assert torch.equal(out, direct)
    assert torch.equal(mixed, direct)


def test_sdpa_kernel_is_honoured(monkeypatch: pytest.MonkeyPatch):
    import sm_flex.engines.autograd as autograd

    q, k, v = qkv(1, 2, 2, 13, 13, 8)
    calls = []
    real = autograd.attend
    monkeypatch.setattr(autograd, "attend", lambda *a, **kw: calls.append(a[0]) or real(*a, **kw))
    with sdpa_kernel(SDPBackend.MATH):
        flex_attention(q, k, v, score_mod=stablemask(0.3))
    assert calls == []
    flex_attention(q, k, v, score_mod=stablemask(0.3))
    assert calls == ["cpu"]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), pytest.raises(RuntimeError, match="No available kernel"):
        flex_attention(q, k, v, score_mod=stablemask(0.3))


def test_a_number_is_kept_in_float64():
    """gamma = 0.1 is the float64 0.1 for float64 inputs, not its float32 neighbour."""
    q, k, v = qkv(1, 2, 2, 40, 40, 8)
    out = flex_attention(q, k, v, score_mod=stablemask(0.1))
    torch.testing.assert_close(out, oracle(q, k, v, gamma=0.1)[0], rtol=0, atol=1e-13)


def test_a_rolled_cache_gives_the_same_step():
    """One query against a ring buffer: the keys' order in their slots does not matter, its position does."""
    q, k, v = qkv(2, 4, 2, 1, 11, 8)
    mask = stablemask(0.2, length=32, positions=torch.tensor([19]))
    straight = flex_attention(q, k, v, score_mod=mask, enable_gqa=True)
    rolled = flex_attention(q, k.roll(4, 2), v.roll(4, 2), score_mod=mask, enable_gqa=True)
    torch.testing.assert_close(rolled, straight)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_spread_as_in_causal_attention(name: str, value: float):
    """In the output and the gradients of the same engine: not one element further, not one less."""
    inputs = dict(zip("qkv", qkv(1, 2, 2, 40, 40, 8), strict=True))
    inputs[name][0, 0, 17, 3] = value

    def finite(fn) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        out = fn(*leaves)
        return [torch.isfinite(x) for x in (out, *torch.autograd.grad(out.sum(), leaves))]

    plain = finite(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    ours = finite(lambda q, k, v: flex_attention(q, k, v, score_mod=stablemask(0.2, length=64)))
    assert not all(x.all() for x in plain)
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b)


def test_other_devices_are_served_by_the_dense_engine(monkeypatch: pytest.MonkeyPatch):
    """What MPS and XPU would run, on the meta device: shapes, dtypes and devices of every drop-in, forward and backward."""
    q, k, v = (torch.empty(2, 4, 7, 8, device="meta", requires_grad=True) for _ in range(3))
    mask = stablemask(0.5, length=9)
    block_mask = create_block_mask(lambda b, h, i, j: i - j < 3, None, None, 7, 7, device="meta")
    outs = [
        flex_attention(q, k, v, score_mod=mask),
        flex_attention(q, k, v, score_mod=mask, block_mask=block_mask),
        scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1, score_mod=mask),
    ]
    cu = torch.empty(3, device="meta", dtype=torch.int32)
    flat_q, flat_k, flat_v = (x[0].transpose(0, 1) for x in (q, k, v))
    outs.append(varlen_attn(flat_q, flat_k, flat_v, cu, cu, 4, 4, window_size=(-1, 0), score_mod=mask))
    for out in outs:
        assert isinstance(out, Tensor)
        assert out.device.type == "meta"
        assert out.dtype == torch.float32
        out.sum().backward()
    assert outs[0].shape == (2, 4, 7, 8)
    assert outs[-1].shape == (7, 4, 8)
    with pytest.raises(NotImplementedError, match=r"FLASH_ATTENTION cannot serve.*MATH is the only one"):
        flex_attention(q, k, v, score_mod=mask, kernel_options={"BACKEND": "FLASH_ATTENTION"})
