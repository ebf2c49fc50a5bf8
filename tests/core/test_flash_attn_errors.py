"""What bad input gets from flash-attn's functions: the kind of error, the argument, and one line."""

from typing import Any

import pytest
import torch

from sm_flex import stablemask
from tests.core.test_flash_attn_signatures import CU, KV, H, K, Q, call

MASK = stablemask(0.5, length=9)
ERRORS: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "not causal": ("func", {"score_mod": MASK}, ValueError, "causal must be True with a StableMask"),
    "a plain score_mod": (
        "func",
        {"score_mod": lambda s, b, h, i, j: s, "causal": True},
        TypeError,
        "must be a StableMask or None",
    ),
    "unordered": (
        "func",
        {"score_mod": stablemask(0.5, length=9, positions=torch.arange(7), ordered=False), "causal": True},
        ValueError,
        "block_mask is required with stablemask",
    ),
    "two sinks": (
        "func",
        {"score_mod": MASK, "causal": True, "learnable_sink": torch.zeros(H)},
        ValueError,
        "must not both be given",
    ),
    "two score_mods": (
        "func",
        {"score_mod": stablemask(0.5, score_mod=lambda s, b, h, i, j: s), "causal": True, "softcap": 1.0},
        NotImplementedError,
        "softcap beside a StableMask with a score_mod of its own",
    ),
    "sink of 3 heads": (
        "func",
        {"learnable_sink": torch.zeros(3)},
        ValueError,
        "sink must have one value for each of the 4 query heads",
    ),
    "sink NaN": ("func", {"learnable_sink": torch.full((H,), torch.nan)}, ValueError, "sink must be below inf and not NaN"),
    "sink +inf": ("func", {"learnable_sink": torch.full((H,), torch.inf)}, ValueError, "sink must be below inf and not NaN"),
    "sink elsewhere": (
        "func",
        {"learnable_sink": torch.zeros(H, device="meta")},
        ValueError,
        "sink must be on the device of query, cpu",
    ),
    "sink 2-D": (
        "func",
        {"learnable_sink": torch.zeros(H, 7)},
        ValueError,
        r"learnable_sink must be \(H,\), .* got shape \(4, 7\)",
    ),
    "no length": (
        "func",
        {"q": Q[:, :3], "score_mod": stablemask(0.5), "causal": True},
        ValueError,
        "length is required where query",
    ),
    "window of one": ("func", {"window_size": 3}, ValueError, r"window_size must be \(left, right\), two ints"),
    "window of floats": ("func", {"window_size": (3.0, 0)}, ValueError, r"window_size must be \(left, right\), two ints"),
    "dropout": ("func", {"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\), got 1.5"),
    "softcap": ("func", {"softcap": None}, TypeError, "softcap must be a number, got None"),
    "causal None": ("func", {"causal": None}, TypeError, "causal must be True or False, got NoneType"),
    "scale": ("func", {"softmax_scale": "1"}, TypeError, "scale must be a number or None, got str"),
    "slopes of 3": ("func", {"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes must be \(4,\) or \(2, 4\), got \(3,\)"),
    "slopes bf16": ("func", {"alibi_slopes": torch.zeros(4).bfloat16()}, TypeError, "alibi_slopes must be a float32 tensor"),
    "slopes elsewhere": (
        "func",
        {"alibi_slopes": torch.zeros(4, device="meta")},
        ValueError,
        "alibi_slopes must be on the device of q",
    ),
    "q 3-D": ("func", {"q": Q[0]}, ValueError, r"q must be \(B, S, H, D\), got shape \(7, 4, 6\)"),
    "q list": ("func", {"q": [1]}, TypeError, "q must be a tensor, got list"),
    "q int": ("func", {"q": Q.int()}, TypeError, "q must be a floating tensor, got dtype torch.int32"),
    "k dtype": ("func", {"k": K.double()}, ValueError, "k must have the dtype of q, torch.float32, got torch.float64"),
    "k elsewhere": ("func", {"k": K.to("meta")}, ValueError, "k must be on the device of q, cpu, got meta"),
    "k batch": ("func", {"k": K[:1], "v": K[:1]}, ValueError, "k must have the batch size of q, 2, got 1"),
    "v length": ("func", {"v": K[:, :3]}, ValueError, r"v must have the rows and heads of k, \(2, 7, 2\), got \(2, 3, 2\)"),
    "head dims": ("func", {"k": K[..., :3]}, ValueError, "k must have the head dim of q, 6, got 3"),
    "heads": ("func", {"q": Q[:, :, :3]}, ValueError, "heads of q must be a multiple of those of k, got 3 and 2"),
    "kv": ("kvpacked_func", {"kv": K}, ValueError, r"kv must be \(B, S, 2, H, D\), got shape \(2, 7, 2, 6\)"),
    "qkv": ("varlen_qkvpacked_func", {"qkv": KV[0]}, ValueError, r"qkv must be \(T, 3, H, D\), got shape \(7, 2, 2, 6\)"),
    "qkv list": ("qkvpacked_func", {"qkv": [1]}, TypeError, "qkv must be a tensor, got list"),
    "cu ends early": (
        "varlen_func",
        {"cu_seqlens_q": CU - torch.tensor([0, 0, 1]).int()},
        ValueError,
        "cu_seqlens_q must rise from 0 to the number of rows, 7",
    ),
    "cu ends late": (
        "varlen_func",
        {"cu_seqlens_k": CU + torch.tensor([0, 0, 1]).int()},
        ValueError,
        "cu_seqlens_k must rise from 0 to the number of rows, 7",
    ),
    "cu int64": ("varlen_func", {"cu_seqlens_q": CU.long()}, TypeError, "cu_seqlens_q must be an int32 tensor, got torch.int64"),
    "cu elsewhere": ("varlen_func", {"cu_seqlens_q": CU.to("meta")}, ValueError, "cu_seqlens_q must be on the device of q, cpu"),
    "documents": (
        "varlen_func",
        {"cu_seqlens_k": CU[[0, 2]]},
        ValueError,
        "cu_seqlens_k must have the documents of cu_seqlens_q, 2, got 1",
    ),
    "longest": ("varlen_func", {"max_seqlen_k": 3}, ValueError, "max_seqlen_k must be at least the longest document, 4, got 3"),
    "longest float": ("varlen_func", {"max_seqlen_q": 4.0}, TypeError, "max_seqlen_q must be an int"),
    "packed without length": (
        "varlen_func",
        {"score_mod": stablemask(0.5), "causal": True},
        ValueError,
        "length is required with packed documents",
    ),
    "packed inner": (
        "varlen_func",
        {"score_mod": stablemask(0.5, length=9, score_mod=lambda s, b, h, i, j: s), "causal": True},
        NotImplementedError,
        "score_mod inside a StableMask is not taken with packed documents",
    ),
    "packed positions": (
        "varlen_func",
        {"score_mod": stablemask(0.5, length=9, positions=torch.zeros(1, 7).long()), "causal": True},
        ValueError,
        r"positions must be \(T_q,\) = \(7,\), got \(1, 7\)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_one_line(case: str) -> None:
    function, options, error, why = ERRORS[case]
    with pytest.raises(error, match=why) as raised:
        call(f"flash_attn_{function}", **options)
    assert len(str(raised.value).splitlines()) == 1
