"""What bad input gets: every refusal names the argument, the rule, what came and the way out.

Kinds, dtypes and shapes are checked under torch.compile too; values of a tensor only eagerly on the CPU, since reading
them elsewhere would wait for the device.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import _get_current_dispatch_mode


def readable(x: Tensor) -> bool:
    """Whether the values of x can be looked at without a graph break or a host synchronisation."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return type(x) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore


def plain_eager() -> bool:
    """Whether a call is nothing but itself: not compiled, not traced, without forward-mode tangents or a dispatch mode."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or forward_ad._current_level >= 0
        or _get_current_dispatch_mode() is not None
    )


def differentiable(*inputs: Tensor | None) -> bool:
    """Whether autograd records what is done with the inputs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def broadcasts(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Whether a tensor of the shape is broadcastable to the full one."""
    return len(shape) <= len(full) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(full), strict=False))


def check_no_transform() -> None:
    """torch.func cannot see through the autograd Functions here."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "torch.func (vmap, grad, vjp, jvp, ...) does not reach into StableMask attention: use torch.autograd, "
            "and the batch dimension in the place of vmap"
        )


def check_gamma(gamma: Any) -> Tensor:
    """gamma as a tensor: a number becomes 0-d float64."""
    if isinstance(gamma, Tensor):
        if not gamma.is_floating_point():
            raise TypeError(f"gamma must be a floating tensor, got dtype {gamma.dtype}")
        if gamma.dim() > 1:
            raise ValueError(f"gamma must be 0-d or (H,), one rate a query head, got shape {tuple(gamma.shape)}")
        if gamma.numel() == 0:
            raise ValueError("gamma must hold at least one rate, got an empty tensor")
        if readable(gamma):
            if gamma.isnan().any():
                raise ValueError("gamma must not be NaN")
            # A learned gamma may drift a little below 0 between two steps; log M continues there.
            if not gamma.requires_grad and bool((gamma < 0).any()):
                raise ValueError(f"gamma must be >= 0, got {gamma.min().item()}")
        return gamma
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)):
        raise TypeError(f"gamma must be a number or a floating tensor, got {type(gamma).__name__}")
    if gamma != gamma:
        raise ValueError("gamma must not be NaN")
    if gamma < 0:
        raise ValueError(f"gamma must be >= 0, got {gamma}")
    if gamma > sys.float_info.max and gamma != float("inf"):
        raise ValueError(f"gamma must be a float64 or inf, got an int of {len(str(gamma))} digits")
    return torch.tensor(float(gamma), dtype=torch.float64)


def check_sink(sink: Any) -> Tensor:
    """sink as a tensor: a number becomes 0-d float64."""
    if isinstance(sink, Tensor):
        if not sink.is_floating_point():
            raise TypeError(f"sink must be a floating tensor, got dtype {sink.dtype}")
        if sink.dim() > 3:
            raise ValueError(f"sink must be 0-d, (H,), or broadcastable to (B, H, S), got shape {tuple(sink.shape)}")
        if readable(sink) and not bool((sink < torch.inf).all()):
            raise ValueError("sink must be below inf and not NaN: it is the log of a mass")
        return sink
    if isinstance(sink, bool) or not isinstance(sink, (int, float)):
        raise TypeError(f"sink must be a number or a floating tensor, got {type(sink).__name__}")
    if not sink < float("inf"):
        raise ValueError(f"sink must be a number below inf, got {sink}")
    if abs(sink) > sys.float_info.max and sink != -float("inf"):
        raise ValueError(f"sink must be a float64, or -inf, got an int of {len(str(abs(sink)))} digits")
    return torch.tensor(float(sink), dtype=torch.float64)


def check_length(length: Any) -> None:
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
        raise TypeError(f"length must be an int, the training length, got {type(length).__name__}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")


def check_positions(positions: Any) -> None:
    check_integers(positions, "positions")
    if positions.dim() not in (1, 2):
        raise ValueError(f"positions must be (S,) or (B, S), got shape {tuple(positions.shape)}")


def check_integers(positions: Any, name: str) -> None:
    if not isinstance(positions, Tensor):
        raise TypeError(f"{name} must be an integer tensor such as torch.tensor([5]), got {type(positions).__name__}")
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an integer tensor, int32 or int64, got dtype {positions.dtype}")


def check_position_values(positions: Tensor) -> None:
    if readable(positions) and positions.numel() and bool((positions < 0).any()):
        raise ValueError(f"positions must be >= 0, got {positions.min().item()}: for padding use positions.clamp(min=0)")


def check_mask_fits(
    mask: Any, batch: int, heads: int, num_queries: int, num_keys: int, device: torch.device, block_mask: BlockMask | None = None
) -> None:
    """A StableMask against the call that it came with: heads, positions, length, device, block_mask."""
    gamma, positions = mask.gamma, mask.positions
    if gamma.dim() == 1 and gamma.shape[0] != heads:
        raise ValueError(
            f"gamma must have one rate for each of the {heads} query heads, got {gamma.shape[0]}: see headwise_gamma"
        )
    if gamma.device != device and not (gamma.dim() == 0 and gamma.device.type == "cpu"):
        raise ValueError(f"gamma must be on the device of query, {device}, got {gamma.device}: use gamma.to({str(device)!r})")
    if mask.sink is not None:
        _check_sink_fits(mask.sink, batch, heads, num_queries, device)
    if not mask.ordered and block_mask is None:
        raise ValueError(
            "block_mask is required with stablemask(..., ordered=False), where it alone says who sees whom: use flex_attention"
        )
    if positions is None:
        if num_queries != num_keys:
            raise ValueError(
                f"positions are required where query and key lengths differ, got S={num_queries} and T={num_keys}: "
                "pass stablemask(..., positions=..., length=...)"
            )
        return
    check_positions_fit(positions, batch, num_queries, device)
    check_position_values(positions)


def _check_sink_fits(sink: Tensor, batch: int, heads: int, num_queries: int, device: torch.device) -> None:
    if sink.device != device and not (sink.dim() == 0 and sink.device.type == "cpu"):
        raise ValueError(f"sink must be on the device of query, {device}, got {sink.device}: use sink.to({str(device)!r})")
    if sink.dim() == 1 and sink.shape[0] != heads:
        raise ValueError(f"sink must have one value for each of the {heads} query heads, got {sink.shape[0]}")
    full = (batch, heads, num_queries)
    if sink.dim() > 1 and not broadcasts(sink.shape, full):
        raise ValueError(f"sink must be broadcastable to (B, H, S) = {full}, got {tuple(sink.shape)}")


def check_positions_fit(positions: Tensor, batch: int, count: int, device: torch.device, name: str = "positions") -> None:
    if positions.device != device:
        raise ValueError(f"{name} must be on the device of query, {device}, got {positions.device}")
    # Only sizes of the same dimension are compared: an exported graph would be told that S is never B.
    fits = positions.shape[-1] == count and (positions.dim() == 1 or (positions.dim() == 2 and positions.shape[0] == batch))
    if not fits:
        raise ValueError(f"{name} must be ({count},) or ({batch}, {count}), got {tuple(positions.shape)}")


def check_qkv(query: Any, key: Any, value: Any, enable_gqa: bool, layout: str) -> None:
    """query, key and value against each other; layout is "BHSD" or "THD"."""
    check_no_transform()
    dims, heads_dim = len(layout), layout.index("H")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != dims:
            raise ValueError(f"{name} must be {dims}-D, ({', '.join(layout)}), with a StableMask, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got dtype {x.dtype}")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise ValueError(f"{name} must have the dtype of query, {query.dtype}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {x.device}")
        if layout == "BHSD" and x.shape[0] != query.shape[0]:
            raise ValueError(f"{name} must have the batch size of query, {query.shape[0]}, got {x.shape[0]}")
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"value must have the batch, heads and length of key, {tuple(key.shape[:-1])}, got {tuple(value.shape[:-1])}"
        )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have the head dim of query, {query.shape[-1]}, got {key.shape[-1]}")
    heads, kv_heads = query.shape[heads_dim], key.shape[heads_dim]
    if heads != kv_heads and not enable_gqa:
        raise ValueError(f"key must have the {heads} heads of query, got {kv_heads}: pass enable_gqa=True for grouped queries")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of key heads, got {heads} and {kv_heads}")


def check_scale(scale: Any) -> None:
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat))):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")


def check_visible(visible: Any, query: Tensor, key: Tensor) -> None:
    if isinstance(visible, BlockMask):
        check_block_mask(visible, query, key, "visible")
    elif not isinstance(visible, Tensor):
        raise TypeError(f"visible must be a boolean tensor, a BlockMask or None, got {type(visible).__name__}")
    elif visible.dtype != torch.bool:
        raise TypeError(
            f"visible must be a boolean tensor, a BlockMask or None, got dtype {visible.dtype}: what is added to the scores "
            "is an inner score_mod, stablemask(..., score_mod=...)"
        )
    else:
        check_attn_mask(visible, query, key, "visible")


def check_attn_mask(attn_mask: Any, query: Tensor, key: Tensor, name: str = "attn_mask") -> None:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor or None, got {type(attn_mask).__name__}")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask must be boolean or floating, got dtype {attn_mask.dtype}")
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in (query.dtype, torch.float32):
        raise ValueError(f"attn_mask must be boolean or of query's dtype, {query.dtype}, got {attn_mask.dtype}")
    if attn_mask.device != query.device:
        raise ValueError(f"{name} must be on the device of query, {query.device}, got {attn_mask.device}")
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if attn_mask.dim() == 0 or not broadcasts(attn_mask.shape, full):
        way_out = ": a (B, T) padding mask goes in as mask[:, None, None, :]" if attn_mask.dim() == 2 else ""
        raise ValueError(f"{name} must be broadcastable to (B, H, S, T) = {full}, got {tuple(attn_mask.shape)}{way_out}")


def check_dropout(dropout_p: Any) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:  # NaN too
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")


def check_block_mask(block_mask: Any, query: Tensor, key: Tensor, name: str = "block_mask") -> None:
    """A BlockMask against (B, H, S, D) query and key."""
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"{name} must be a BlockMask or None, got {type(block_mask).__name__}")
    if block_mask.kv_num_blocks.device != query.device:
        raise ValueError(f"{name} must be on the device of query, {query.device}, got {block_mask.kv_num_blocks.device}")
    expected, shape = (query.shape[2], key.shape[2]), tuple(block_mask.seq_lengths)
    if shape[0] != expected[0] or shape[1] != expected[1]:
        raise ValueError(
            f"{name} must be for (S, T) = {expected}, got {shape}: build it with create_block_mask for these lengths"
        )
    batch, heads = block_mask.kv_num_blocks.shape[:2]
    if batch not in (1, query.shape[0]) or heads not in (1, query.shape[1]):
        raise ValueError(f"{name} must be for (1|B, 1|H) of {tuple(query.shape[:2])}, got {(batch, heads)}")


def check_varlen(
    query: Any,
    key: Any,
    value: Any,
    cu_q: Any,
    cu_k: Any,
    window_size: Any,
    enable_gqa: bool,
    mask: Any,
    paged: dict[str, Any],
) -> None:
    """varlen_attn's own arguments, with a StableMask."""
    if "block_table" not in paged:
        check_qkv(query, key, value, enable_gqa, "THD")
        if value.shape[-1] != query.shape[-1]:
            raise ValueError(f"value must have the head dim of query, {query.shape[-1]}, got {value.shape[-1]}")
    if differentiable(query, key, value, mask.gamma, mask.sink):
        for name in ("block_table", "seqused_k"):
            if name in paged:
                raise NotImplementedError(f"{name} is for inference: call under torch.no_grad()")
    if mask.length is None:
        raise ValueError("length is required by varlen_attn: pass stablemask(gamma, length=N), the training length")
    if mask.score_mod is not None:
        raise NotImplementedError(
            "score_mod inside a StableMask is not taken by varlen_attn, whose kernels have none: use flex_attention with a "
            "document block_mask"
        )
    pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    if not pair or not all(isinstance(x, int) for x in window_size) or window_size[1] != 0 or window_size[0] < -1:
        raise ValueError(
            f"window_size must be (-1, 0) or (W, 0) with a StableMask, which is causal, got {window_size}: pass (-1, 0)"
        )
    for name, cu in (("cu_seq_q", cu_q), ("cu_seq_k", cu_k)):
        if cu is None and name == "cu_seq_k" and paged:
            continue
        check_cu_seqlens(name, cu, query.device)
    _check_documents(query, key, cu_q, cu_k, mask, paged)


def check_cu_seqlens(name: str, cu: Any, device: torch.device) -> None:
    if not isinstance(cu, Tensor) or cu.dtype != torch.int32:
        raise TypeError(f"{name} must be an int32 tensor, got {cu.dtype if isinstance(cu, Tensor) else type(cu).__name__}")
    if cu.dim() != 1 or cu.shape[0] < 2:
        raise ValueError(f"{name} must be (documents + 1,), got shape {tuple(cu.shape)}")
    if cu.device != device:
        raise ValueError(f"{name} must be on the device of query, {device}, got {cu.device}")


def check_cu_values(name: str, cu: Tensor, total: int) -> None:
    if readable(cu) and (cu[0] != 0 or cu[-1] != total or bool((cu.diff() < 0).any())):
        raise ValueError(f"{name} must rise from 0 to the number of rows, {total}, got {cu.tolist()}")


def _check_documents(query: Tensor, key: Tensor, cu_q: Tensor, cu_k: Tensor | None, mask: Any, paged: dict[str, Any]) -> None:
    num_queries = query.shape[0]
    num_keys = num_queries if paged else key.shape[0]
    if mask.positions is not None and mask.positions.dim() != 1:
        raise ValueError(f"positions must be (T_q,) = ({num_queries},) for varlen_attn, got {tuple(mask.positions.shape)}")
    if paged and mask.positions is None:
        raise ValueError("positions are required with a paged or padded cache: pass stablemask(..., positions=..., length=...)")
    check_mask_fits(mask, 1, query.shape[1], num_queries, num_keys, query.device)
    if cu_k is None or paged:
        return
    if cu_k.shape != cu_q.shape:
        raise ValueError(f"cu_seq_k must have the documents of cu_seq_q, {cu_q.shape[0] - 1}, got {cu_k.shape[0] - 1}")
    for name, cu, total in (("cu_seq_q", cu_q, num_queries), ("cu_seq_k", cu_k, key.shape[0])):
        check_cu_values(name, cu, total)
    if mask.positions is None and cu_k is not cu_q and readable(cu_q) and not torch.equal(cu_q, cu_k):
        raise ValueError(
            "positions are required where a document's query and key lengths differ: "
            "pass stablemask(..., positions=..., length=...)"
        )


def check_longest(name: str, longest: Any, cu: Tensor | None) -> None:
    if isinstance(longest, bool) or not isinstance(longest, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, the longest document's length, got {type(longest).__name__}")
    if cu is not None and readable(cu) and int(cu.diff().max()) > longest:
        raise ValueError(f"{name} must be at least the longest document, {int(cu.diff().max())}, got {longest}")


def check_aux(return_aux: Any, kind: type) -> None:
    if return_aux is not None and not isinstance(return_aux, kind):
        raise TypeError(f"return_aux must be an AuxRequest or None, got {type(return_aux).__name__}")


def check_kernel_options(kernel_options: Any) -> None:
    if kernel_options is not None and not isinstance(kernel_options, dict):
        raise TypeError(f"kernel_options must be a dict or None, got {type(kernel_options).__name__}")
