"""What bad input gets: the kind of error, the argument in its message, and a way out; all of it in one test."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from sm_flex import (
    StableMask,
    flex_attention,
    headwise_gamma,
    log_mass,
    remask,
    scaled_dot_product_attention,
    stablemask,
    varlen_attn,
)

Q = torch.randn(2, 4, 7, 8)
K2 = torch.randn(2, 2, 7, 8)
THD = torch.randn(7, 4, 8)
CU = torch.tensor([0, 3, 7], dtype=torch.int32)
OUT, LSE = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7)


def flex(gamma: Any = 0.5, q: Any = Q, k: Any = Q, v: Any = Q, mask: Any = None, **kwargs: Any) -> Callable[[], Any]:
    return lambda: flex_attention(q, k, v, score_mod=mask or stablemask(gamma), **kwargs)


def sdpa(q: Any = Q, k: Any = Q, v: Any = Q, mask: Any = None, **kwargs: Any) -> Callable[[], Any]:
    kwargs.setdefault("score_mod", mask or stablemask(0.5))
    return lambda: scaled_dot_product_attention(q, k, v, **kwargs)


def varlen(mask: Any = None, q: Any = THD, k: Any = THD, v: Any = THD, cu_q: Any = CU, cu_k: Any = CU, **kwargs: Any):
    kwargs = {"window_size": (-1, 0), "score_mod": mask or stablemask(0.5, length=9), **kwargs}
    return lambda: varlen_attn(q, k, v, cu_q, cu_k, 4, 4, **kwargs)


def positions(*shape: int, **kwargs: Any) -> StableMask:
    return stablemask(0.5, length=kwargs.pop("length", 9), positions=torch.zeros(shape, dtype=torch.int64), **kwargs)


def make(*args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: stablemask(*args, **kwargs)


META = torch.empty(2, 4, 7, 8, device="meta")

CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # gamma
    "gamma negative": (make(-0.5), ValueError, "gamma must be >= 0, got -0.5"),
    "gamma -1": (make(-1), ValueError, "gamma must be >= 0"),
    "gamma NaN": (make(math.nan), ValueError, "gamma must not be NaN"),
    "gamma bool": (make(True), TypeError, "gamma must be a number.*bool"),
    "gamma complex": (make(1j), TypeError, "gamma must be a number.*complex"),
    "gamma string": (make("0.5"), TypeError, "gamma must be a number.*str"),
    "gamma None": (make(None), TypeError, "gamma must be a number.*NoneType"),
    "gamma list": (make([0.5]), TypeError, "gamma must be a number.*list"),
    "gamma integer tensor": (make(torch.tensor(1)), TypeError, "gamma must be a floating tensor, got dtype torch.int64"),
    "gamma complex tensor": (make(torch.tensor(1j)), TypeError, "gamma must be a floating tensor"),
    "gamma int beyond floats": (make(10**400), ValueError, "gamma must be a float64 or inf, got an int of 401 digits"),
    "gamma 2-D": (make(torch.rand(4, 1)), ValueError, r"gamma must be 0-d or \(H,\).*\(4, 1\)"),
    "gamma empty": (make(torch.rand(0)), ValueError, "gamma must hold at least one value"),
    "gamma negative tensor": (make(torch.tensor([0.1, -0.1])), ValueError, "gamma must be >= 0, got -0.1"),
    "gamma NaN tensor": (make(torch.tensor(math.nan)), ValueError, "gamma must not be NaN"),
    "gamma of 3 heads for 4": (flex(torch.rand(3)), ValueError, "gamma must have one value for each of the 4 query heads, got 3"),
    "gamma of the key heads": (flex(torch.rand(2), k=K2, v=K2, enable_gqa=True), ValueError, "gamma .* 4 query heads, got 2"),
    "gamma elsewhere": (flex(torch.rand(4, device="meta")), ValueError, "gamma must be on the device of query, cpu, got meta"),
    # length
    "length zero": (make(0.5, length=0), ValueError, "length must be at least 1, got 0"),
    "length negative": (make(0.5, length=-3), ValueError, "length must be at least 1, got -3"),
    "length bool": (make(0.5, length=True), TypeError, "length must be an int.*bool"),
    "length float": (make(0.5, length=7.0), TypeError, "length must be an int.*float"),
    # positions
    "positions float": (make(0.5, length=9, positions=torch.rand(7)), TypeError, "positions must be an integer tensor.*float32"),
    "positions bool": (make(0.5, length=9, positions=torch.ones(7) > 0), TypeError, "positions must be an integer tensor"),
    "positions int16": (make(0.5, length=9, positions=torch.arange(7).short()), TypeError, "positions must be .*int32 or int64"),
    "positions list": (make(0.5, length=9, positions=[0, 1]), TypeError, "positions must be an integer tensor.*got list"),
    "positions 3-D": (lambda: positions(1, 2, 7), ValueError, r"positions must be \(S,\) or \(B, S\).*\(1, 2, 7\)"),
    "positions without length": (lambda: positions(7, length=None), ValueError, "length is required where positions"),
    "positions of another S": (flex(mask=positions(6)), ValueError, r"positions must be \(7,\) or \(2, 7\), got \(6,\)"),
    "positions of another B": (flex(mask=positions(3, 7)), ValueError, r"positions must be \(7,\) or \(2, 7\), got \(3, 7\)"),
    "positions negative": (flex(mask=stablemask(0.5, length=9, positions=torch.arange(7) - 1)), ValueError, "positions must be >= 0, got -1"),
    "positions missing": (flex(q=Q[:, :, :3]), ValueError, "positions are required where query and key lengths differ, got S=3 and T=7"),
    # score_mod
    "nested": (lambda: stablemask(0.5, score_mod=stablemask(0.5)), TypeError, "got another StableMask"),
    "inner not callable": (lambda: stablemask(0.5, score_mod=3), TypeError, "score_mod must be callable or None, got int"),  # pyright: ignore
    "plain score_mod to sdpa": (sdpa(is_causal=True, score_mod=lambda s, b, h, i, j: s), TypeError, "score_mod of scaled_dot_product_attention must be a StableMask"),
    "plain score_mod to varlen": (varlen(score_mod=lambda s, b, h, i, j: s), TypeError, "score_mod of varlen_attn must be a StableMask"),
    "called by hand": (lambda: stablemask(0.5)(Q, *(Q,) * 4), TypeError, "sm_flex.flex_attention"),
    "torch's own flex": (lambda: torch_flex_attention(Q, Q, Q, score_mod=stablemask(0.5)), Exception, "sm_flex.flex_attention"),
    # ordered
    "ordered None": (make(0.5, length=9, ordered=None), TypeError, "ordered must be True or False, got NoneType"),
    "unordered without positions": (make(0.5, length=9, ordered=False), ValueError, "positions are required with ordered=False"),
    "unordered without block_mask": (flex(mask=positions(7, ordered=False)), ValueError, "block_mask is required with .*ordered=False"),
    "unordered sdpa": (sdpa(mask=positions(7, ordered=False), attn_mask=torch.ones(7, 7) > 0), ValueError, "block_mask is required .*use flex_attention"),
    "unordered sdpa without a mask": (sdpa(mask=positions(7, ordered=False)), ValueError, "block_mask is required .*use flex_attention"),
    "unordered varlen": (varlen(positions(7, ordered=False)), ValueError, "block_mask is required .*use flex_attention"),
    "presoftmax with length": (lambda: stablemask(0.5, length=9).presoftmax(*(Q,) * 5), ValueError, "without length and positions"),
    # options of flex_attention
    "BACKEND unknown": (flex(kernel_options={"BACKEND": "CUDA"}), ValueError, "BACKEND must be one of AUTO, .*got 'CUDA'"),
    "BACKEND of a GPU": (flex(kernel_options={"BACKEND": "CUDNN_ATTENTION"}), NotImplementedError, "BACKEND CUDNN_ATTENTION cannot serve"),
    "BACKEND of flex": (flex(kernel_options={"BACKEND": "TRITON"}), NotImplementedError, "BACKEND TRITON cannot serve.*CUDA"),
    "BACKEND with inner": (flex(mask=stablemask(0.5, score_mod=lambda s, b, h, i, j: s), kernel_options={"BACKEND": "FLASH_ATTENTION"}), NotImplementedError, "neither an inner score_mod"),
    "other kernel_options": (flex(kernel_options={"BLOCK_M": 64}), NotImplementedError, "kernel_options other than BACKEND.*cpu"),
    "max_scores": (flex(return_aux=AuxRequest(max_scores=True)), NotImplementedError, "max_scores"),
    "lse twice": (flex(return_lse=True, return_aux=AuxRequest(lse=True)), ValueError, "return_lse and return_aux"),
    "block_mask of another kind": (flex(block_mask=torch.ones(7, 7)), TypeError, "block_mask must be a BlockMask or None, got Tensor"),
    "block_mask of other lengths": (flex(block_mask=create_block_mask(lambda b, h, i, j: i >= j, None, None, 9, 7, device="cpu")), ValueError, r"block_mask must be for \(S, T\) = \(7, 7\), got \(9, 7\)"),
    "block_mask of other heads": (flex(block_mask=create_block_mask(lambda b, h, i, j: i >= j, 1, 3, 7, 7, device="cpu")), ValueError, r"block_mask must be for \(1\|B, 1\|H\)"),
    "return_aux of another kind": (flex(return_aux=True), TypeError, "return_aux must be an AuxRequest or None, got bool"),
    "kernel_options of another kind": (flex(kernel_options=5), TypeError, "kernel_options must be a dict or None, got int"),
    "scale string": (flex(scale="1"), TypeError, "scale must be a number or None, got str"),
    # query, key, value
    "heads differ": (flex(k=K2, v=K2), ValueError, "key must have the 4 heads of query, got 2: pass enable_gqa"),
    "heads do not divide": (flex(k=Q[:, :3], v=Q[:, :3], enable_gqa=True), ValueError, "query heads must be a multiple of key heads, got 4 and 3"),
    "value heads": (flex(v=K2, enable_gqa=True), ValueError, "value must have the batch, heads and length of key"),
    "head dim": (flex(k=Q[..., :5]), ValueError, "key must have the head dim of query, 8, got 5"),
    "value length": (flex(v=Q[:, :, :5]), ValueError, "value must have the batch, heads and length of key"),
    "dtype": (flex(k=Q.double()), ValueError, "key must have the dtype of query, torch.float32, got torch.float64"),
    "device": (flex(v=META), ValueError, "value must be on the device of query, cpu, got meta"),
    "batch": (flex(k=Q[:1], v=Q[:1]), ValueError, "key must have the batch size of query, 2, got 1"),
    "integer": (flex(q=Q.long(), k=Q.long(), v=Q.long()), TypeError, "query must be a floating tensor, got dtype torch.int64"),
    "3-D": (flex(q=Q[0], k=Q[0], v=Q[0]), ValueError, "query must be 4-D"),
    "not a tensor": (flex(q=[1.0]), TypeError, "query must be a tensor, got list"),
    # scaled_dot_product_attention
    "neither causal nor mask": (sdpa(), ValueError, "is_causal must be True, or attn_mask given"),
    "both causal and mask": (sdpa(is_causal=True, attn_mask=torch.ones(7, 7) > 0), ValueError, "is_causal and attn_mask must not both"),
    "causal with other lengths": (sdpa(q=Q[:, :, :3], mask=positions(3), is_causal=True), ValueError, "is_causal needs equal lengths.*attn_mask"),
    "attn_mask of another shape": (sdpa(attn_mask=torch.ones(6, 7) > 0), ValueError, r"attn_mask must be broadcastable to \(B, H, S, T\) = \(2, 4, 7, 7\), got \(6, 7\)"),
    "attn_mask 5-D": (sdpa(attn_mask=torch.ones(1, 1, 1, 7, 7)), ValueError, "attn_mask must be broadcastable"),
    "attn_mask integer": (sdpa(attn_mask=torch.ones(7, 7).long()), TypeError, "attn_mask must be boolean or floating, got dtype torch.int64"),
    "attn_mask of another dtype": (sdpa(attn_mask=torch.ones(7, 7).double()), ValueError, "attn_mask must be boolean or of query's dtype"),
    "attn_mask list": (sdpa(attn_mask=[True]), TypeError, "attn_mask must be a tensor or None, got list"),
    "attn_mask elsewhere": (sdpa(attn_mask=torch.ones(7, 7, device="meta")), ValueError, "attn_mask must be on the device of query"),
    "dropout 1": (sdpa(is_causal=True, dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "dropout negative": (sdpa(is_causal=True, dropout_p=-0.1), ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
    "dropout NaN": (sdpa(is_causal=True, dropout_p=math.nan), ValueError, "dropout_p must be in"),
    "dropout string": (sdpa(is_causal=True, dropout_p="0"), TypeError, "dropout_p must be a number, got str"),
    # varlen_attn
    "varlen without length": (varlen(stablemask(0.5)), ValueError, r"length is required by varlen_attn: pass stablemask\(gamma, length=N\)"),
    "varlen window not causal": (varlen(window_size=(-1, -1)), ValueError, r"window_size must be \(-1, 0\) or \(W, 0\).*\(-1, -1\)"),
    "varlen window None": (varlen(window_size=None), ValueError, "window_size must be"),
    "varlen window float": (varlen(window_size=(1.5, 0)), ValueError, "window_size must be"),
    "varlen return_aux": (varlen(return_aux=5), TypeError, "return_aux must be an AuxRequest or None, got int"),
    "varlen max_q": (lambda: varlen_attn(THD, THD, THD, CU, CU, "a", 4, window_size=(-1, 0), score_mod=stablemask(0.5, length=9)), TypeError, "max_q must be an int"),  # pyright: ignore
    "varlen window ahead": (varlen(window_size=(3, 2)), ValueError, "window_size must be"),
    "varlen inner": (varlen(stablemask(0.5, length=9, score_mod=lambda s, b, h, i, j: s)), NotImplementedError, "use flex_attention"),
    "varlen positions 2-D": (varlen(positions(1, 7)), ValueError, r"positions must be \(T_q,\) = \(7,\)"),
    "varlen cu list": (varlen(cu_q=[0, 7]), TypeError, "cu_seq_q must be an int32 tensor, got list"),
    "varlen cu float": (varlen(cu_k=CU.float()), TypeError, "cu_seq_k must be an int32 tensor, got torch.float32"),
    "varlen cu None": (varlen(cu_k=None), TypeError, "cu_seq_k must be an int32 tensor, got NoneType"),
    "varlen cu 2-D": (varlen(cu_q=CU[None]), ValueError, r"cu_seq_q must be \(documents \+ 1,\)"),
    "varlen documents differ": (varlen(cu_k=torch.tensor([0, 7]).int()), ValueError, "cu_seq_k must have the documents of cu_seq_q, 2, got 1"),
    "varlen cu short": (varlen(cu_q=CU - 1), ValueError, "cu_seq_q must rise from 0 to the number of rows, 7"),
    "varlen cu ends early": (varlen(cu_q=torch.tensor([0, 3, 6]).int()), ValueError, r"cu_seq_q must rise from 0 to the number of rows, 7, got \[0, 3, 6\]"),
    "varlen cu ends late": (varlen(cu_k=torch.tensor([0, 3, 8]).int()), ValueError, r"cu_seq_k must rise from 0 to the number of rows, 7, got \[0, 3, 8\]"),
    "varlen lengths differ": (varlen(cu_k=torch.tensor([0, 4, 7]).int()), ValueError, "positions are required where a document's"),
    "varlen 4-D": (varlen(q=Q), ValueError, "query must be 3-D"),
    "varlen heads": (varlen(k=THD[:, :2], v=THD[:, :2]), ValueError, "pass enable_gqa=True"),
    "varlen paged on CPU": (varlen(positions(7), seqused_k=CU[1:]), NotImplementedError, "seqused_k needs a newer torch on CUDA"),
    # remask, log_mass, headwise_gamma
    "remask out int": (lambda: remask(OUT.long(), LSE, LSE), TypeError, "out must be a floating tensor"),
    "remask lse shape": (lambda: remask(OUT, LSE[..., :6], LSE), ValueError, r"lse must have the shape of out without its last.*\(2, 4, 6\)"),
    "remask lse bf16": (lambda: remask(OUT, LSE.bfloat16(), LSE), TypeError, "lse must be float32 or float64"),
    "remask log_mass shape": (lambda: remask(OUT, LSE, LSE[:, :3]), ValueError, r"log_mass must be broadcastable to lse, \(2, 4, 7\), got \(2, 3, 7\)"),
    "remask log_mass too large": (lambda: remask(OUT, LSE, LSE[None]), ValueError, "log_mass must be broadcastable"),
    "remask number": (lambda: remask(OUT, LSE, 0.0), TypeError, "log_mass must be a tensor, got float"),  # pyright: ignore
    "remask device": (lambda: remask(OUT, LSE, LSE.to("meta")), ValueError, "log_mass must be on the device of out"),
    "log_mass negative positions": (lambda: log_mass(0.5, torch.tensor([-1]), 3), ValueError, "positions must be >= 0, got -1"),
    "log_mass float positions": (lambda: log_mass(0.5, torch.tensor([1.0]), 3), TypeError, "positions must be an integer tensor"),
    "log_mass length": (lambda: log_mass(0.5, torch.tensor([1]), 0), ValueError, "length must be at least 1"),
    "headwise zero": (lambda: headwise_gamma(0), ValueError, "num_heads must be at least 1, got 0"),
    "headwise float": (lambda: headwise_gamma(4.0), TypeError, "num_heads must be an int, got float"),  # pyright: ignore
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str):
    call, kind, message = CASES[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        call()


# Values are not read in a compiled region; kinds, dtypes and shapes are.
UNSEEN_WHEN_COMPILED = {"varlen cu short", "varlen cu ends early", "varlen cu ends late", "varlen lengths differ"}
TRACED = [
    "heads",
    "value",
    "head",
    "dtype",
    "batch",
    "integer",
    "3-D",
    "neither",
    "both",
    "causal",
    "attn_mask",
    "BACKEND",
    "varlen",
    "remask",
]
COMPILED = [name for name in CASES if name.split()[0] in TRACED and name not in UNSEEN_WHEN_COMPILED]
COMPILED += ["positions of another S", "positions missing", "gamma of 3 heads for 4"]


@pytest.mark.parametrize("name", COMPILED)
def test_bad_input_compiled(name: str, fresh_compiler: None):
    """The same refusals, with the same words, when the call is traced."""
    call, kind, message = CASES[name]
    with pytest.raises((kind, TorchDynamoException), match=f"(?s){message}"):
        torch.compile(call, fullgraph=True, backend="eager")()


def test_torchs_flex_refuses_a_stablemask_compiled(fresh_compiler: None):
    def run() -> Any:
        return torch_flex_attention(Q, Q, Q, score_mod=stablemask(0.5))

    with pytest.raises(Exception, match=r"(?s)sm_flex\.flex_attention"):
        torch.compile(run, fullgraph=True, backend="eager")()


def test_a_learned_gamma_may_drift_below_zero():
    gamma = torch.tensor([-1e-3, 0.1], requires_grad=True)
    q = torch.randn(1, 2, 5, 4)
    out = flex_attention(q, q, q, score_mod=stablemask(gamma))
    assert isinstance(out, torch.Tensor)
    assert torch.isfinite(out).all()


def test_an_int_gamma_is_a_number():
    q = torch.randn(1, 2, 5, 4)
    one, other = (flex_attention(q, q, q, score_mod=stablemask(gamma)) for gamma in (1, 1.0))
    assert torch.equal(one, other)  # pyright: ignore[reportArgumentType]
