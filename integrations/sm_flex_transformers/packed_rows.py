"""Calls that no mask is needed for: windows and packed documents, on the engines that take documents one after another.

Dimension letters: B sequences, S queries, T keys.
"""

from typing import Any

import torch
from torch import Tensor

from sm_flex import StableMask, varlen_attn
from sm_flex_transformers import windows
from sm_flex_transformers.layer_rows import Rows


def serves(rows: Rows, query: Tensor) -> bool:
    """Whether a call needs no mask on the engines for packed documents, and would need one elsewhere.

    On CUDA in float32 those are but the formula.
    """
    (num_queries, dim), num_keys = query.shape[2:], rows.key.shape[2]
    if num_queries == 1 or rows.told is not None or rows.selected is not None or rows.bias is not None:
        return False
    if rows.documents is None and rows.window is None and num_queries == num_keys:
        return False
    if rows.documents is not None and (rows.documents.cu_seqlens is None or num_queries != num_keys):
        return False
    if query.device.type == "cuda":
        return query.dtype in (torch.bfloat16, torch.float16) and dim <= 256
    return query.device.type == "cpu"


def attend(query: Tensor, rows: Rows, mask: StableMask, scale: float | None) -> Tensor:
    """Causal attention (B, S, H, Dv) of queries at the end of their keys, within a window, or within documents.

    mask: for the rows of all sequences one after another.
    """
    batch, _, num_queries, _ = query.shape
    num_keys = rows.key.shape[2]
    q, k, v = [x.transpose(1, 2).flatten(0, 1) for x in (query, rows.key, rows.value)]
    if rows.documents is None:
        starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
        cu_q = starts * num_queries
        cu_k = cu_q if num_queries == num_keys else starts * num_keys
    else:
        assert rows.documents.cu_seqlens is not None, "serves() asks for them"
        cu_q = cu_k = rows.documents.cu_seqlens
        if rows.documents.starts_BP.shape[0] < batch:  # one row of positions for every sequence
            first = torch.arange(batch, dtype=torch.int32, device=query.device)[:, None] * num_queries
            cu_q = cu_k = torch.cat([cu_q[:1], (first + cu_q[1:]).flatten()])
    options: Any = {"scale": scale, "enable_gqa": True, "window_size": windows.window_size(rows.window)}
    out: Any = varlen_attn(q, k, v, cu_q, cu_k, num_queries, num_keys, **options, score_mod=mask)
    return out.unflatten(0, (batch, num_queries)).contiguous()
