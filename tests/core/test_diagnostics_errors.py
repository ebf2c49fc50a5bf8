"""What bad input to the diagnostics gets: the kind of error, the argument in its message, and a way out."""

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from sm_flex import stablemask
from sm_flex.diagnostics import attention_map, first_token_share, real_share

Q, K = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8)
MASK = stablemask(0.5, length=9)
STEP = stablemask(0.5, length=9, positions=torch.tensor([6]))
DIAGNOSTICS = (attention_map, first_token_share, real_share)
CU = torch.tensor([0, 5, 5, 6, 13], dtype=torch.int32)
CU7 = torch.tensor([0, 3, 7], dtype=torch.int32)
UNORDERED = stablemask(0.5, length=9, positions=torch.arange(7), ordered=False)
CAUSAL = create_block_mask(lambda b, h, i, j: i >= j, None, None, 7, 7, device="cpu")
CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "a number for a mask": ((Q, K, 0.5), {}, TypeError, "mask must be a StableMask, or None.*got float.*stablemask"),
    "no tensor": (([1.0], K, MASK), {}, TypeError, "query must be a tensor, got list"),
    "3-D": ((Q[0], K[0], MASK), {}, ValueError, r"query must be 4-D, \(B, H, S, D\)"),
    "integers": ((Q.long(), K.long(), MASK), {}, TypeError, "query must be a floating tensor, got dtype torch.int64"),
    "heads": ((Q[:, :3], K, MASK), {}, ValueError, "query heads must be a multiple of key heads, got 3 and 2"),
    "head dim": ((Q, K[..., :5], MASK), {}, ValueError, "key must have the head dim of query, 8, got 5"),
    "dtype": ((Q, K.double(), MASK), {}, ValueError, "key must have the dtype of query"),
    "gamma of 3 heads": ((Q, K, stablemask(torch.rand(3))), {}, ValueError, "gamma must have one value for each of the 4"),
    "positions missing": ((Q[:, :, :3], K, MASK), {}, ValueError, "positions are required where query and key lengths differ"),
    "scale": ((Q, K, MASK), {"scale": "1"}, TypeError, "scale must be a number or None, got str"),
    "visible list": ((Q, K, MASK), {"visible": [True]}, TypeError, "visible must be a boolean tensor, a BlockMask .*got list"),
    "visible float": ((Q, K, MASK), {"visible": torch.zeros(7, 7)}, TypeError, "visible must be a boolean.*float32.*score_mod"),
    "visible shape": ((Q, K, MASK), {"visible": torch.ones(6, 7) > 0}, ValueError, r"visible must be broadcastable to \(B, H"),
    "visible block mask": (
        (Q, K, MASK), {"visible": create_block_mask(lambda b, h, i, j: i >= j, None, None, 9, 7, device="cpu")},
        ValueError, r"visible must be for \(S, T\) = \(7, 7\), got \(9, 7\)",
    ),
    "cu_seqlens list": ((Q, K, MASK), {"cu_seqlens": [0, 7]}, TypeError, "cu_seqlens must be an int32 tensor, got list"),
    "cu_seqlens 2-D": ((Q, K, MASK), {"cu_seqlens": CU[None]}, ValueError, r"cu_seqlens must be \(documents \+ 1,\)"),
    "cu_seqlens short": ((Q, K, MASK), {"cu_seqlens": CU}, ValueError, "cu_seqlens must rise from 0 to the number of rows, 7"),
    "cu_seqlens without length": ((Q, K, stablemask(0.5)), {"cu_seqlens": CU7}, ValueError, "length is required with cu_seqlens"),
    "cu_seqlens unordered": (
        (Q, K, UNORDERED), {"cu_seqlens": CU7, "visible": CAUSAL},
        ValueError, "cu_seqlens is for rows in order.*ordered=False",
    ),
    "cu_seqlens of a step": ((Q[:, :, :1], K, STEP), {"cu_seqlens": CU7}, ValueError, "cu_seqlens is for.*S=1, T=7.*visible"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str):
    args, kwargs, kind, message = CASES[name]
    for diagnostic in DIAGNOSTICS:
        with pytest.raises(kind, match=message):
            diagnostic(*args, **kwargs)


@pytest.mark.parametrize(
    ("key_positions", "kind", "message"),
    [
        (None, ValueError, "key_positions are required where query and key lengths differ, got S=1 and T=7"),
        ([0, 1], TypeError, "key_positions must be an integer tensor"),
        (torch.zeros(7), TypeError, "key_positions must be an integer tensor, int32 or int64, got dtype torch.float32"),
        (torch.arange(6), ValueError, r"key_positions must be \(7,\) or \(2, 7\), got \(6,\)"),
        (torch.zeros(1, 2, 7).long(), ValueError, r"key_positions must be \(7,\) or \(2, 7\), got \(1, 2, 7\)"),
        (torch.zeros(3, 7).long(), ValueError, r"key_positions must be \(7,\) or \(2, 7\), got \(3, 7\)"),
        (torch.arange(7, device="meta"), ValueError, "key_positions must be on the device of query, cpu, got meta"),
    ],
)
def test_bad_key_positions(key_positions: Any, kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        first_token_share(Q[:, :, :1], K, STEP, key_positions=key_positions)
