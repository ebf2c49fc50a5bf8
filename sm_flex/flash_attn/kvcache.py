"""flash_attn_with_kvcache: new keys and values written into the cache in place, and attention to it."""

from typing import Any

import torch
from torch import Tensor

from sm_flex.checks.fits import check_mask_fits
from sm_flex.dispatch import attend
from sm_flex.flash_attn.attend import attend_batch, attend_spans, mask_of, score_mod_of
from sm_flex.flash_attn.request import Request, check_batch, check_slopes, check_tensors, read, refuse
from sm_flex.flash_attn.spans import spans_of
from sm_flex.runtime import differentiable, readable
from sm_flex.score_mod import StableMask


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    score_mod: StableMask | None = None,
    learnable_sink: Tensor | None = None,
    **newer: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """FlashAttention 2's flash_attn_with_kvcache on PyTorch's engines, and with a StableMask eq. 11.

    k and v are written into the caches in place, behind the first cache_seqlens rows of each sequence. Then the
    queries attend to them: they stand at the end of what the cache holds, as in :func:`flash_attn_func`. For
    inference: there is no backward.

    Args:
        q: (B, S, H, D).
        k_cache, v_cache: (B_cache, T, Hkv, D) and (B_cache, T, Hkv, Dv), written to where k and v are given.
        k, v: (B, S_new, Hkv, D) and (B, S_new, Hkv, Dv), both or neither; they need cache_seqlens.
        rotary_cos, rotary_sin: refused. rotary_interleaved is about them.
        cache_seqlens: an int, or (B,) int32 or int64, how many rows of each sequence the cache holds before the
            call, left padding included. None: all T.
        cache_batch_idx: (B,) integers, the row of the cache that each sequence has; 0..B-1 where None. They must
            be distinct where k and v are given.
        cache_leftpad: (B,) integers, the first row of the cache that counts.
        block_table: refused.
        softmax_scale, causal, window_size, softcap, learnable_sink, newer: as in flash_attn_func.
        alibi_slopes: (H,) or (B, H), float32.
        num_splits: of flash-attn's kernel; it changes no number.
        return_softmax_lse: also return the natural log-sum-exp of each row, (B, H, S), with the mass of a
            StableMask and a sink in it; -inf for a row that sees no key.
        score_mod: a StableMask with a length, which wants causal=True. A query's position, where the mask has
            none, is its slot in the cache without the left padding.

    Returns:
        (B, S, H, Dv) in q's dtype, or (out, lse).

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule, what came and the way out.

    With an int, or values on a CPU that are the same for all sequences, the part of the cache that is in use is
    attended to alone. Otherwise all T rows are, with a mask of B x S x T elements; no value of a GPU's tensor is
    waited for.

    Example:
        >>> k_cache = v_cache = torch.zeros(1, 16, 2, 8)
        >>> q = k = v = torch.randn(1, 1, 2, 8)
        >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=5, causal=True).shape
        torch.Size([1, 1, 2, 8])
    """
    name = "flash_attn_with_kvcache"
    for refused, x in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin), ("block_table", block_table)):
        if x is not None:
            refuse(refused, name)
    request = read(
        name, dropout_p=0.0, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, deterministic=False, score_mod=score_mod, learnable_sink=learnable_sink, newer=newer,
    )  # fmt: skip
    if score_mod is not None and score_mod.length is None:
        raise ValueError("length is required with a cache: pass stablemask(gamma, length=N), the training length")
    if score_mod is not None and score_mod.score_mod is not None:
        raise NotImplementedError(
            "score_mod inside a StableMask is not taken with a cache, where a query's index is not its position: use softcap "
            "or alibi_slopes"
        )
    new = _check(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, cache_leftpad)
    check_slopes(alibi_slopes, q.shape[0], q)
    if differentiable(q, k_cache, v_cache, k, v, learnable_sink, alibi_slopes, *_learned(score_mod)):
        raise NotImplementedError("flash_attn_with_kvcache is for inference: call under torch.no_grad()")
    check_mask_fits(
        mask_of(request, q, 0, None), (q.shape[0], q.shape[2], q.shape[1]), q.shape[1], q.device, values=v_cache.shape[-2:]
    )
    held = _common(k_cache.shape[1] if cache_seqlens is None else cache_seqlens)
    if k is not None and v is not None:
        _write(k_cache, v_cache, k, v, held, cache_batch_idx)
    out, lse = _attend(q, k_cache, v_cache, request, held, new, cache_batch_idx, cache_leftpad, return_softmax_lse)
    if return_softmax_lse:
        assert lse is not None
        return out, lse
    return out


def _attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    request: Request,
    held: int | Tensor,
    new: int,
    row: Tensor | None,
    pad: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    start = 0 if pad is None else _common(pad)
    if not isinstance(start, Tensor) and not isinstance(held, Tensor):
        k, v = [_rows_of(x[:, start : held + new], row) for x in (k_cache, v_cache)]
        return attend_batch(q, k, v, request, return_lse=return_lse)
    k_BHTD, v_BHTD = [_rows_of(x, row).transpose(1, 2) for x in (k_cache, v_cache)]
    (batch, num_queries), num_keys = q.shape[:2], k_cache.shape[1]
    first, end_B1 = [_column(0 if x is None else x, batch, q.device) for x in (pad, held)]
    end_B1 = end_B1 + new
    slot = end_B1 - num_queries + torch.arange(num_queries, device=q.device)
    spans = spans_of(slot, first, end_B1, request.left, request.right)
    mask = mask_of(request, q, num_keys, (slot - first).clamp(min=0))
    inner = score_mod_of(request, slot, q, k_cache)
    if inner is None and (request.right == 0 or num_queries == 1):
        visible = spans.rows(num_keys)(0, num_queries)
        options: Any = {"scale": request.scale, "attn_mask": visible, "return_lse": return_lse}
        out, lse, _ = attend(q.transpose(1, 2), k_BHTD, v_BHTD, mask, **options)
    else:
        out, lse = attend_spans(q.transpose(1, 2), k_BHTD, v_BHTD, mask, inner, spans, request, return_lse=return_lse)
    return out.transpose(1, 2), lse


def _write(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, held: int | Tensor, row: Tensor | None) -> None:
    batch, new = k.shape[:2]
    if row is None and not isinstance(held, Tensor):
        k_cache[:, held : held + new] = k
        v_cache[:, held : held + new] = v
        return
    slots = _column(held, batch, k.device) + torch.arange(new, device=k.device)
    rows = torch.arange(batch, device=k.device) if row is None else row.long()
    k_cache[rows[:, None], slots] = k
    v_cache[rows[:, None], slots] = v


def _common(x: int | Tensor) -> int | Tensor:
    """The number that all elements are, where it can be known without waiting for a GPU."""
    if not isinstance(x, Tensor) or not readable(x) or not x.numel() or bool((x != x[0]).any()):
        return x
    return int(x[0])


def _column(x: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """(B, 1) int64."""
    x = x.long() if isinstance(x, Tensor) else torch.full((batch,), x, device=device)
    return x.unsqueeze(1)


def _rows_of(cache: Tensor, row: Tensor | None) -> Tensor:
    return cache if row is None else cache[row.long()]


def _learned(mask: StableMask | None) -> tuple[Tensor | None, ...]:
    return () if mask is None else (mask.gamma, mask.sink, mask.sink_value)


def _check(q: Any, k_cache: Any, v_cache: Any, k: Any, v: Any, held: Any, row: Any, pad: Any) -> int:
    """The tensors of the call against each other. Returns how many rows are new."""
    check_tensors("BSHD", False, q, k_cache, v_cache, ("k_cache", "v_cache"))
    (batch, _, _, _), (cache_rows, slots) = q.shape, k_cache.shape[:2]
    for name, x in (("cache_seqlens", held), ("cache_batch_idx", row), ("cache_leftpad", pad)):
        if isinstance(x, Tensor):
            _check_per_sequence(name, x, q)
        elif x is not None and (name != "cache_seqlens" or isinstance(x, bool) or not isinstance(x, (int, torch.SymInt))):
            raise TypeError(f"{name} must be an integer tensor (B,), got {type(x).__name__}")
    if row is None and cache_rows != batch:
        raise ValueError(f"k_cache must have the batch size of q, {batch}, got {cache_rows}: or pass cache_batch_idx")
    if row is not None and readable(row) and not bool(((row >= 0) & (row < cache_rows)).all()):
        raise ValueError(f"cache_batch_idx must be rows of the cache, 0 to {cache_rows - 1}, got {row.tolist()}")
    if (k is None) != (v is None):
        raise ValueError(f"k and v must both be given or neither, got {'v' if k is None else 'k'} alone")
    new = 0
    if k is not None:
        if held is None:
            raise ValueError("cache_seqlens must be given with k and v: it says where in the cache they go")
        check_tensors("BSHD", False, q, k, v)
        check_batch("k", k, q)
        for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
            if x.shape[2:] != cache.shape[2:]:
                raise ValueError(
                    f"{name} must have the heads of {name}_cache, {tuple(cache.shape[2:])}, got {tuple(x.shape[2:])}"
                )
        new = k.shape[1]
        if row is not None and readable(row) and row.unique().numel() != batch:
            raise ValueError(f"cache_batch_idx must be distinct where k and v are given, got {row.tolist()}")
    _check_held(0 if held is None else held, pad, new, slots)
    return new


def _check_per_sequence(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 tensor, got {x.dtype}")
    if x.shape != q.shape[:1]:
        raise ValueError(f"{name} must be (B,) = ({q.shape[0]},), got {tuple(x.shape)}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")


def _check_held(held: int | Tensor, pad: Tensor | None, new: int, slots: int) -> None:
    """Values of a GPU's tensor are not looked at."""
    if isinstance(held, Tensor) and not (readable(held) and held.numel()):
        return
    least, most = (int(held.min()), int(held.max())) if isinstance(held, Tensor) else (held, held)
    if least < 0 or most + new > slots:
        raise ValueError(f"cache_seqlens must be from 0 to {slots - new}, the cache's {slots} rows less {new} new, got {held}")
    if pad is not None and readable(pad) and bool((pad < 0).any()):
        raise ValueError(f"cache_leftpad must be >= 0, got {pad.tolist()}")
