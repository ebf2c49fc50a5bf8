"""What torch's own scaled_dot_product_attention would run on CUDA, and what an sdpa_kernel() context allows.

torch's query functions cannot be traced. In compiled code they are asked once, when the call is traced, for
stand-ins of fixed lengths, so that lengths stay dynamic.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from sm_flex.engines import Need
from sm_flex.runtime import fused_sdp_choice

ENGINE_OF = {
    SDPBackend.FLASH_ATTENTION.value: "flash",
    SDPBackend.CUDNN_ATTENTION.value: "cudnn",
    SDPBackend.EFFICIENT_ATTENTION.value: "efficient",
}


def torchs_engine(need: Need) -> str:
    """The engine behind the SDPBackend that torch would take."""
    return ENGINE_OF.get(torchs_choice(need), "dense")


def torchs_choice(need: Need) -> int:
    """The value of that SDPBackend."""
    q, k, v, attn_mask, dropout_p = need.q, need.k, need.v, need.attn_mask, need.dropout_p
    if not torch.compiler.is_compiling():
        return _eager_choice(q, k, v, attn_mask, dropout_p)
    # The length of a list makes a constant of a dynamic dimension.
    heads, kv_heads, dim, v_dim = [len([None] * n) for n in (q.shape[1], k.shape[1], q.shape[-1], v.shape[-1])]
    queries = 1 if q.shape[2] == 1 else 128
    keys = queries if q.shape[2] == k.shape[2] else 256
    # Of dropout the kernels ask whether there is any, and cuDNN whether it is a multiple of 1/16.
    dropout_p = 0.0 if dropout_p == 0 else 0.5 if dropout_p * 16 % 1 == 0 else 0.3
    mask_dtype = None if attn_mask is None else attn_mask.dtype
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    sizes = (heads, kv_heads, dim, v_dim, queries, keys)
    return _traced_choice(str(q.device), q.dtype, sizes, mask_dtype, dropout_p, grad)


@torch.compiler.assume_constant_result
def _traced_choice(
    device: str, dtype: torch.dtype, sizes: tuple[int, ...], mask_dtype: torch.dtype | None, dropout_p: float, grad: bool
) -> int:
    """_eager_choice for stand-ins, made when the call is traced."""
    heads, kv_heads, dim, v_dim, queries, keys = sizes
    q = torch.empty(1, heads, queries, dim, device=device, dtype=dtype, requires_grad=grad)
    k = torch.empty(1, kv_heads, keys, dim, device=device, dtype=dtype)
    v = torch.empty(1, kv_heads, keys, v_dim, device=device, dtype=dtype)
    mask = None if mask_dtype is None else torch.empty(1, 1, queries, keys, device=device, dtype=mask_dtype)
    return _eager_choice(q, k, v, mask, dropout_p)


def _eager_choice(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float) -> int:
    """torch's answer for what will run. With S != T that is flash by its own alignment if it may, else a mask."""
    if attn_mask is None and _unequal(q, k):
        if can_use("flash", q, k, v, None, dropout_p):
            return SDPBackend.FLASH_ATTENTION.value
        attn_mask = _stand_in_mask(q, k)
    causal = attn_mask is None and q.shape[2] > 1
    return fused_sdp_choice(q, k, v, attn_mask, dropout_p, causal, enable_gqa=q.shape[1] != k.shape[1])


def can_use(engine: str, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float) -> bool:
    """Whether torch's kernel takes the call, in the sdpa_kernel() context in force."""
    if engine == "efficient":  # it is given repeated heads (efficient.py)
        k, v = [x[:, :1].expand(-1, q.shape[1], -1, -1) for x in (k, v)]
    if engine != "flash" and attn_mask is None and _unequal(q, k):
        attn_mask = _stand_in_mask(q, k)
    causal = attn_mask is None and q.shape[2] == k.shape[2] and q.shape[2] > 1
    cuda = torch.backends.cuda
    params = cuda.SDPAParams(q, k, v, attn_mask, dropout_p, causal, q.shape[1] != k.shape[1])
    can = {
        "flash": cuda.can_use_flash_attention,
        "cudnn": cuda.can_use_cudnn_attention,
        "efficient": cuda.can_use_efficient_attention,
    }
    return can[engine](params)


@torch.compiler.assume_constant_result
def enabled(backend: str) -> bool:
    """Whether the sdpa_kernel() context in force allows a kernel. On a CPU torch knows two, flash and math."""
    assert backend in ("FLASH_ATTENTION", "MATH")
    return torch.backends.cuda.math_sdp_enabled() if backend == "MATH" else torch.backends.cuda.flash_sdp_enabled()


def _unequal(q: Tensor, k: Tensor) -> bool:
    """Whether causality, aligned to the end, is more than torch's is_causal says."""
    return q.shape[2] not in (1, k.shape[2])


def _stand_in_mask(q: Tensor, k: Tensor) -> Tensor:
    """The shape of the causal mask that S != T will be given. Kernels want its rows dense."""
    return q.new_empty((1, 1, 1, k.shape[2]), dtype=torch.bool).expand(1, 1, q.shape[2], k.shape[2])
