"""Which engine serves a call. The choice follows from what the call needs, never from a failure of something else.

BACKEND AUTO takes the first line that fits the call; the figure is the fact that the line rests on, benchmarks.speed its source.

device  call                                 engine and the figure behind it
CUDA    options of torch's flex kernels, an  flex: the only one that takes them
        inner score_mod, a block_mask
CUDA    bf16, fp16, fp32                     flash, cuDNN or efficient: what torch's scaled_dot_product_attention takes, whose
                                             order, limits and sdpa_kernel() contexts hold here too; not measured yet
CUDA    packed, bf16 and fp16                varlen: not measured yet, and the only one that takes them
CPU     all that PyTorch's flash op takes    cpu: at S = 1k the formula of the paper takes 5.6 times as long
CPU     packed                               varlen_cpu: the same op, for one document or one block of a window after another
any     everything else: other devices,      dense: the only one that takes them
        float64 on CUDA; on a CPU score_mods,
        block masks and dropout
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

ENGINE_OF = {
    SDPBackend.FLASH_ATTENTION.value: "flash",
    SDPBackend.CUDNN_ATTENTION.value: "cudnn",
    SDPBackend.EFFICIENT_ATTENTION.value: "efficient",
}
# What kernel_options={"BACKEND": ...} may name: torch flex's own, and the kernels of scaled_dot_product_attention.
FLEX_BACKENDS = ("TRITON", "TRITON_DECODE", "FLASH")
SDPA_BACKENDS = {
    "FLASH_ATTENTION": "flash",
    "CUDNN_ATTENTION": "cudnn",
    "EFFICIENT_ATTENTION": "efficient",
    "MATH": "dense",
}
# The gradient of lse widens the head dim by 8 (autograd.py), which must stay within what the kernel takes.
WIDEST_WITH_LSE_GRAD = {"flash": 248, "cudnn": 120, "varlen": 248}
BEFORE_2_13, BEFORE_2_14 = torch.__version__ < "2.13", torch.__version__ < "2.14"
BACKENDS = ("AUTO", *SDPA_BACKENDS, *FLEX_BACKENDS)


class Need(NamedTuple):
    """What a call needs of its engine."""

    score_mod: bool = False
    block_mask: bool = False
    flex_options: bool = False
    dropout_p: float = 0.0
    lse_grad: bool = False


def choose(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, need: Need, backend: str = "AUTO") -> str:
    """The engine's name: flash, cudnn, efficient, cpu, flex or dense."""
    if backend != "AUTO":
        return _named(q, k, v, attn_mask, need, backend)
    empty = 0 in (*q.shape, *k.shape, *v.shape)
    if need.flex_options:
        return _flex_or_error(q, empty)
    if need.score_mod or need.block_mask:
        takes = q.device.type == "cuda" and attn_mask is None and not need.dropout_p and q.dtype != torch.float64
        return "flex" if takes and not empty else "dense"
    if empty:
        return "dense"
    if q.device.type == "cpu":
        return _on_cpu(q, v, attn_mask, need)
    if q.device.type == "cuda" and torch.version.hip is None:
        return _on_cuda(q, k, v, attn_mask, need)
    return "dense"


def _on_cpu(q: Tensor, v: Tensor, attn_mask: Tensor | None, need: Need) -> str:
    if _why_not_cpu(q, v, attn_mask, need) is None and _enabled("FLASH_ATTENTION"):
        return "cpu"
    if _enabled("MATH"):
        return "dense"
    raise RuntimeError("No available kernel: sdpa_kernel() allows neither FLASH_ATTENTION for this call nor MATH")


def _why_not_cpu(q: Tensor, v: Tensor, attn_mask: Tensor | None, need: Need) -> str | None:
    if need.score_mod or need.block_mask:
        return "it takes neither an inner score_mod nor a block_mask"
    if need.dropout_p:
        return "it has no dropout"
    if attn_mask is not None and attn_mask.requires_grad:
        return "it gives attn_mask no gradient"
    if v.shape[-1] != q.shape[-1]:
        return "it wants one head dim for query and value"
    if q.dtype == torch.float64 and torch.compiler.is_compiling() and BEFORE_2_13:
        return "compiled in float64 it is NaN on this torch"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"it has no {q.dtype}"
    return None


def _on_cuda(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, need: Need) -> str:
    if _finer(attn_mask, q):
        return "dense"
    choice = ENGINE_OF.get(_torch_choice(q, k, v, attn_mask, need), "dense")
    if choice == "cudnn" and attn_mask is not None and attn_mask.requires_grad:
        return "dense"
    widest = max(q.shape[-1], v.shape[-1])
    if (
        need.lse_grad
        and choice == "cudnn"
        and widest > WIDEST_WITH_LSE_GRAD["cudnn"]
        and attn_mask is None
        and _enabled("FLASH_ATTENTION")
    ):
        choice = "flash"
    if need.lse_grad and widest > WIDEST_WITH_LSE_GRAD.get(choice, widest):
        return "dense"
    return choice


def _finer(attn_mask: Tensor | None, q: Tensor) -> bool:
    """Whether a floating mask has more precision than the kernels, which take it in query's dtype, would keep."""
    return attn_mask is not None and attn_mask.is_floating_point() and attn_mask.dtype != q.dtype


def needs_bias(engine: str, q: Tensor, k: Tensor) -> bool:
    """Whether causality must come as a bias: the kernel's own flag is aligned to the start, and S != T."""
    return engine != "flash" and q.shape[2] != 1 and q.shape[2] != k.shape[2]


def _torch_choice(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, need: Need) -> int:
    """The SDPBackend that torch would take."""
    if not torch.compiler.is_compiling():
        return _eager_choice(q, k, v, attn_mask, need.dropout_p)
    # Stand-ins of fixed lengths, so that lengths stay dynamic. A list's length makes a constant of a dynamic dimension.
    heads, kv_heads, dim, v_dim = [len([None] * n) for n in (q.shape[1], k.shape[1], q.shape[-1], v.shape[-1])]
    queries = 1 if q.shape[2] == 1 else 128
    keys = queries if q.shape[2] == k.shape[2] else 256
    # Of dropout the kernels ask whether there is any, and cuDNN whether it is a multiple of 1/16.
    dropout_p = 0.0 if need.dropout_p == 0 else 0.5 if need.dropout_p * 16 % 1 == 0 else 0.3
    mask_dtype = None if attn_mask is None else attn_mask.dtype
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return _traced_choice(
        str(q.device), q.dtype, heads, kv_heads, dim, v_dim, queries, keys, mask_dtype, dropout_p, grad
    )  # fmt: skip


def _eager_choice(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float) -> int:
    """torch's answer for what will run: with S != T flash by its own alignment if it may, else a mask."""
    if attn_mask is None and needs_bias("", q, k):
        if _can_use("flash", q, k, v, None, dropout_p):
            return SDPBackend.FLASH_ATTENTION.value
        attn_mask = _stand_in_mask(q, k)
    fused_choice = torch._fused_sdp_choice  # pyright: ignore[reportPrivateImportUsage]
    causal = attn_mask is None and q.shape[2] > 1
    return fused_choice(q, k, v, attn_mask, dropout_p, causal, enable_gqa=q.shape[1] != k.shape[1])


def _can_use(engine: str, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float) -> bool:
    """Whether torch's kernel takes the call, in the sdpa_kernel() context in force."""
    flags = torch.backends.cuda
    if engine == "efficient":  # it is given repeated heads (engines/efficient.py)
        k, v = [x[:, :1].expand(-1, q.shape[1], -1, -1) for x in (k, v)]
    if attn_mask is None and needs_bias(engine, q, k):
        attn_mask = _stand_in_mask(q, k)
    causal = attn_mask is None and q.shape[2] == k.shape[2] and q.shape[2] > 1
    params = flags.SDPAParams(q, k, v, attn_mask, dropout_p, causal, q.shape[1] != k.shape[1])
    can = {
        "flash": flags.can_use_flash_attention,
        "cudnn": flags.can_use_cudnn_attention,
        "efficient": flags.can_use_efficient_attention,
    }
    return can[engine](params)


def _stand_in_mask(q: Tensor, k: Tensor) -> Tensor:
    """The shape of the causal mask that S != T will be given; kernels want its rows dense."""
    return q.new_empty((1, 1, 1, k.shape[2]), dtype=torch.bool).expand(1, 1, q.shape[2], k.shape[2])


@torch._dynamo.assume_constant_result
def _traced_choice(
    device: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    v_dim: int,
    queries: int,
    keys: int,
    mask_dtype: torch.dtype | None,
    dropout_p: float,
    grad: bool,
) -> int:
    """_eager_choice for stand-ins, made when the call is traced."""
    q = torch.empty(1, heads, queries, dim, device=device, dtype=dtype, requires_grad=grad)
    k = torch.empty(1, kv_heads, keys, dim, device=device, dtype=dtype)
    v = torch.empty(1, kv_heads, keys, v_dim, device=device, dtype=dtype)
    mask = None if mask_dtype is None else torch.empty(1, 1, queries, keys, device=device, dtype=mask_dtype)
    return _eager_choice(q, k, v, mask, dropout_p)


@torch._dynamo.assume_constant_result
def _enabled(backend: str) -> bool:
    """Whether the sdpa_kernel() context in force allows a kernel; on a CPU torch knows two, flash and math."""
    flags = torch.backends.cuda
    return {"FLASH_ATTENTION": flags.flash_sdp_enabled, "MATH": flags.math_sdp_enabled}[backend]()


def _flex_or_error(q: Tensor, empty: bool) -> str:
    if q.device.type != "cuda":
        raise NotImplementedError(
            "kernel_options other than BACKEND, and max_scores, belong to torch's flex kernels on CUDA; "
            f"query is on {q.device}: leave them out"
        )
    if empty:
        raise NotImplementedError("kernel_options belong to torch's flex kernels, which take no empty tensor: leave them out")
    return "flex"


def _named(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, need: Need, backend: str) -> str:
    """The engine asked for by name, or why it cannot serve."""
    if backend not in BACKENDS:
        raise ValueError(f"BACKEND must be one of {', '.join(BACKENDS)}, got {backend!r}")

    def refuse(why: str) -> NotImplementedError:
        return NotImplementedError(f"BACKEND {backend} cannot serve this call: {why}. Leave it at AUTO")

    empty = 0 in (*q.shape, *k.shape, *v.shape)
    if backend in FLEX_BACKENDS:
        if q.device.type != "cuda":
            raise refuse(f"torch's flex kernels train on CUDA only, query is on {q.device}")
        if backend == "FLASH" and BEFORE_2_14:
            raise refuse("its log-sum-exp is wrong by ln 2 before torch 2.14")
        if empty:
            raise refuse("it takes no empty tensor")
        return "flex"
    if need.flex_options:
        raise refuse("other kernel_options, and max_scores, belong to torch's flex kernels")
    if backend == "MATH":
        return "dense"
    if need.score_mod or need.block_mask:
        raise refuse("it takes neither an inner score_mod nor a block_mask")
    if empty:
        raise refuse("it takes no empty tensor")
    if q.device.type == "cpu":
        if backend != "FLASH_ATTENTION":
            raise refuse("a CPU has FLASH_ATTENTION and MATH")
        why = _why_not_cpu(q, v, attn_mask, need)
        if why is not None:
            raise refuse(why)
        return "cpu"
    if q.device.type != "cuda":
        raise refuse(f"query is on {q.device}, where MATH is the only one")
    engine = SDPA_BACKENDS[backend]
    if need.lse_grad and max(q.shape[-1], v.shape[-1]) > WIDEST_WITH_LSE_GRAD.get(engine, 1 << 30):
        raise refuse(f"with a log-sum-exp that has a gradient it takes head dims up to {WIDEST_WITH_LSE_GRAD[engine]}")
    if not _cuda_takes(engine, q, k, v, attn_mask, need):
        raise refuse("torch's kernel does not take this device, dtype, shape or mask")
    return engine


def _cuda_takes(engine: str, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, need: Need) -> bool:
    if _finer(attn_mask, q) or (attn_mask is not None and engine == "cudnn" and attn_mask.requires_grad):
        return False
    # Under torch.compile the kernel itself says no when it is traced.
    return torch.compiler.is_compiling() or _can_use(engine, q, k, v, attn_mask, need.dropout_p)


def choose_packed(q: Tensor, k: Tensor, lse_grad: bool) -> str:
    """The engine's name for packed documents: varlen, varlen_cpu or dense."""
    if 0 in (*q.shape, *k.shape):
        return "dense"
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        return "varlen" if q.shape[-1] <= (WIDEST_WITH_LSE_GRAD["varlen"] if lse_grad else 256) else "dense"
    if q.device.type == "cpu" and q.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return "varlen_cpu"
    return "dense"
