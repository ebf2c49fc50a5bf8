"""What a person would pick today for attention with a sink or a mass, each as its own users call it.

Every call is (q, k, v, sink) -> out, (B, H, S, D) and a sink per head (H,). A peer without a learned sink has the
fixed one of softmax-off-by-one, e^0 beside the scores, and ignores the argument. What a peer cannot do is not
written here: benchmarks.speed.peer_rows finds it out.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention
from torch.overrides import TorchFunctionMode

from benchmarks.speed.timing import Call
from benchmarks.speed.variants import Setup, dense_formula
from sm_flex import scaled_dot_product_attention, stablemask

FIXED, LEARNED, HEADWISE = "sink 0", "learned sink", "head-wise gamma"
MASSES = (LEARNED, FIXED, HEADWISE)


class Peer(NamedTuple):
    """dense says that it holds something of S x S, so that its bytes are estimated before it is run."""

    name: str
    mass: str
    build: Callable[[Setup], Call]
    dense: bool = True


def ours(at: Setup, mass: str) -> Call:
    gqa, kept = at.gqa, {FIXED: 0.0, HEADWISE: None}
    gamma = at.gammas["headwise"] if mass == HEADWISE else math.inf

    def learned(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        mask = stablemask(math.inf, length=at.length, sink=sink)
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa, score_mod=mask)

    if mass == LEARNED:
        return learned
    fixed = stablemask(gamma, length=at.length, sink=kept[mass])
    return lambda q, k, v, _: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa, score_mod=fixed)


def _transformers(at: Setup) -> Call:
    """gpt-oss's, with the float mask that its model makes once for all layers: not counted."""
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    dtype = torch.bfloat16 if at.case.dtype == "bf16" else torch.float32
    mask = torch.full((at.length, at.length), torch.finfo(dtype).min, dtype=dtype, device=at.device).triu(1)[None, None]
    groups, scale = at.case.heads // at.case.kv_heads, at.case.head_dim**-0.5

    def call(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        module = cast(Any, SimpleNamespace(num_key_value_groups=groups, sinks=sink, training=True))
        return eager_attention_forward(module, q, k, v, mask, scale)[0].transpose(1, 2)

    return call


class _CudaIsCpu(TorchFunctionMode):
    """A tensor that is asked for on "cuda" is made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextmanager
def _importing_without_a_gpu() -> Iterator[None]:
    """flash-attention-softmax-n makes a tensor on "cuda" when it is imported, and never uses it."""
    if torch.cuda.is_available():
        yield
        return
    with _CudaIsCpu():
        yield


def _softmax_n(at: Setup) -> Call:
    with _importing_without_a_gpu():
        from flash_attention_softmax_n import flash_attention_n  # pyright: ignore[reportMissingImports]
    return lambda q, k, v, _: flash_attention_n(q, k, v, softmax_n_param=1, is_causal=True)


def _softmax_n_slow(at: Setup) -> Call:
    with _importing_without_a_gpu():
        from flash_attention_softmax_n import slow_attention_n  # pyright: ignore[reportMissingImports]
    return lambda q, k, v, _: slow_attention_n(q, k, v, softmax_n_param=1.0, is_causal=True)


def _x_transformers(at: Setup) -> Call:
    """Its Attend with head_learned_sink, "working solution from gpt-oss"; it refuses flash = True."""
    from x_transformers.attend import Attend  # pyright: ignore[reportMissingImports]

    attend: Any = Attend(causal=True, heads=at.case.heads, head_learned_sink=True)
    del attend.head_attn_sink  # its parameter; a tensor of that name takes its place

    def call(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        attend.head_attn_sink = sink
        return attend(q, k, v)[0]

    return call


def _x_transformers_flash(at: Setup) -> Call:
    """Its Attend with add_zero_kv on torch's SDPA: a key of zeros has score 0 and value 0."""
    from x_transformers.attend import Attend  # pyright: ignore[reportMissingImports]

    attend = Attend(causal=True, heads=at.case.heads, add_zero_kv=True, flash=True)
    return lambda q, k, v, _: attend(q, k, v)[0]


def _flex_lse(at: Setup) -> Call:
    """torchtitan's way, out * sigmoid(lse - sink): compiled on a GPU; on a CPU eager, as compiled code there has no lse."""
    block_mask, gqa = _causal_blocks(at, 0), at.gqa

    def call(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        out, aux = torch_flex_attention(q, k, v, block_mask=block_mask, enable_gqa=gqa, return_aux=AuxRequest(lse=True))
        return out * torch.sigmoid(cast(Tensor, aux.lse) - sink.reshape(-1, 1)).unsqueeze(-1).to(out.dtype)

    return torch.compile(call, dynamic=False, fullgraph=True) if at.device.type == "cuda" else call


def _flex_compiled(at: Setup) -> Call:
    """A key of zeros in front, whose score a captured score_mod replaces by the sink."""
    block_mask, gqa = _causal_blocks(at, 1), at.gqa

    def call(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return torch.where(kv_idx == 0, sink[h].to(score.dtype), score)

        k, v = (torch.nn.functional.pad(x, (0, 0, 1, 0)) for x in (k, v))
        return cast(Tensor, torch_flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=gqa))

    return torch.compile(call, dynamic=False, fullgraph=True)


def _causal_blocks(at: Setup, more: int) -> BlockMask:
    """Causal for keys behind so many more, which every query sees."""

    def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx + more >= kv_idx

    return create_block_mask(causal, None, None, at.length, at.length + more, device=str(at.device))


def _dense(at: Setup) -> Call:
    call = dense_formula(at)
    return lambda q, k, v, _: call(q, k, v)


ALL = {
    "transformers": Peer("transformers, eager", LEARNED, _transformers),
    "softmax-n": Peer("flash-attention-softmax-n, flash", FIXED, _softmax_n),
    "softmax-n slow": Peer("flash-attention-softmax-n, slow", FIXED, _softmax_n_slow),
    "x-transformers": Peer("x-transformers, head_learned_sink", LEARNED, _x_transformers),
    "x-transformers flash": Peer("x-transformers, add_zero_kv, flash", FIXED, _x_transformers_flash),
    "flex lse": Peer("flex_attention, out * sigmoid(lse - sink)", LEARNED, _flex_lse),
    "flex compiled": Peer("flex_attention compiled, a key for the sink", LEARNED, _flex_compiled, dense=False),
    "dense": Peer("dense formula of eq. 11", HEADWISE, _dense),
}


def versions() -> str:
    """Of the packages, as far as they are installed."""
    return ", ".join(f"{name} {_version(name)}" for name in ("transformers", "flash-attention-softmax-n", "x-transformers"))


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        return "not installed"
