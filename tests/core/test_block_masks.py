"""flex_attention with a BlockMask on a CPU: documents and windows, masks that are not causal, shards out of order."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask

from sm_flex import flex_attention, stablemask
from sm_flex.diagnostics import attention_map
from sm_flex.testing import assert_matches_eq11, oracle
from tests.helpers.problems import documents, flex_with_lse, gamma_of, qkv


def window_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx - kv_idx <= 40


@pytest.mark.parametrize("block_size", [16, 128])
def test_block_mask_of_documents_and_window(block_size: int):
    lengths = [3, 150, 1, 46]
    total = sum(lengths)
    _, ids, positions = documents(lengths)

    def same_document(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ids[q_idx] == ids[kv_idx]

    block_mask = create_block_mask(
        and_masks(same_document, window_mask), None, None, total, total, device="cpu", BLOCK_SIZE=block_size
    )
    i = torch.arange(total)
    visible = (ids.unsqueeze(1) == ids) & (i.unsqueeze(1) - i <= 40)
    inputs = [*qkv(2, 4, 2, total, total, 8), gamma_of(4, torch.float64)]
    kwargs = {"length": 160, "positions": positions}
    assert_matches_eq11(flex_with_lse(block_mask=block_mask, **kwargs), inputs, {**kwargs, "visible": visible})


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
    _, ids, all_positions = documents(lengths)
    positions = all_positions[mine]
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
    expected = oracle(*whole[:3], gamma=whole[3], length=40, positions=all_positions, visible=visible)
    torch.testing.assert_close(out, expected[0][:, :, mine])
    torch.testing.assert_close(lse, expected[1][:, :, mine])
    weights = attention_map(shard[0], shard[1], stablemask(shard[3], **options), visible=block_mask)
    torch.testing.assert_close(weights @ shard[2].repeat_interleave(2, dim=1), out)
