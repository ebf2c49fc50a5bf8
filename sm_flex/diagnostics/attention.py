"""The matrix of eq. 11, its column of first tokens, the real share of each row."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sm_flex.checks.fits import check_positions_fit
from sm_flex.checks.mask import check_integers
from sm_flex.diagnostics.calls import CheckedCall, by_rows, read
from sm_flex.mass.closed_form import document_of
from sm_flex.score_mod import StableMask


def attention_map(
    query: Tensor,
    key: Tensor,
    mask: StableMask | None,
    *,
    scale: float | None = None,
    visible: Tensor | BlockMask | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """softmax(A_SM) o C, the matrix of eq. 11 by which the values are multiplied.

    S x T numbers per head: look at one layer, and one sequence, at a time.

    Args:
        query: (B, H, S, D). key: (B, Hkv, T, D), with H a multiple of Hkv.
        mask: the StableMask of the call, whose inner score_mod acts on the real scores, or None for plain
            causal attention.
        scale: of the scores, 1/sqrt(D) where None.
        visible: what is seen within the causal slots (key j by query i when j <= i + (T - S)): a boolean
            tensor broadcastable to (B, H, S, T), a BlockMask, or None for all of it.
        cu_seqlens: (documents + 1,) int32, the first row of each document and T, where documents are packed
            one after another along S = T, in every row of the batch alike. Each sees itself alone, and the
            mass restarts with it, as in varlen_attn.

    Returns:
        (B, H, S, T), float32 (float64 for float64 inputs), 0 above the diagonal. A row sums to the share of
        it that is real: to 1 without a mass, to 0 where it sees nothing.

    Raises:
        TypeError, ValueError, NotImplementedError: as the drop-ins, naming the argument, the rule, what came
            and the way out.

    Example:
        >>> q = k = torch.zeros(1, 1, 3, 4)
        >>> attention_map(q, k, stablemask(0.0, length=5))[0, 0]
        tensor([[0.2000, 0.0000, 0.0000],
                [0.2000, 0.2000, 0.0000],
                [0.2000, 0.2000, 0.2000]])
    """
    call = read(query, key, mask, scale, visible, cu_seqlens)
    return by_rows(call, lambda weights, share: weights * share.unsqueeze(-1), call.key.shape[2])


def first_token_share(
    query: Tensor,
    key: Tensor,
    mask: StableMask | None,
    *,
    scale: float | None = None,
    visible: Tensor | BlockMask | None = None,
    cu_seqlens: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> Tensor:
    """The attention that each row pays to the first token of its own sequence: Figure 1(b), attention sinks.

    It is that row's entry of :func:`attention_map` in the column of the token, without an S x T tensor.

    Args:
        query, key, mask, scale, visible, cu_seqlens: as for attention_map.
        key_positions: (T,) or (B, T) integers, the position of each key in its own sequence. A first token is
            a visible key at position 0; any other, negative ones too, is none (what no query sees may be at
            0: padding). None: the first row of each document of cu_seqlens, else the positions of the mask,
            else slot 0 (pass them for left padding without a StableMask); S and T must then be equal.

    Returns:
        (B, H, S), float32 (float64 for float64 inputs); 0 for a row that no longer sees its first token.

    Raises:
        TypeError, ValueError, NotImplementedError: as the drop-ins, naming the argument, the rule, what came
            and the way out.

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 4)
        >>> first_token_share(q, k, None)
        tensor([[[1.0000, 0.5000, 0.3333, 0.2500]]])
        >>> first_token_share(q, k, stablemask(0.0, length=5))
        tensor([[[0.2000, 0.2000, 0.2000, 0.2000]]])
    """
    call = read(query, key, mask, scale, visible, cu_seqlens)
    first = _first_tokens(call, cu_seqlens, key_positions)
    return by_rows(call, lambda weights, share: (weights * first).sum(-1) * share)


def real_share(
    query: Tensor,
    key: Tensor,
    mask: StableMask | None,
    *,
    scale: float | None = None,
    visible: Tensor | BlockMask | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The share of each row's attention that goes to real tokens: alpha of section 4.2, eq. 11's row sums.

    Args:
        query, key, mask, scale, visible, cu_seqlens: as for :func:`attention_map`.

    Returns:
        (B, H, S) in [0, 1], float32 (float64 for float64 inputs): 1 without a mass, 0 for a row that sees
        nothing. No S x T tensor is made.

    Raises:
        TypeError, ValueError, NotImplementedError: as the drop-ins, naming the argument, the rule, what came
            and the way out.

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 4)
        >>> real_share(q, k, stablemask(0.0, length=5))
        tensor([[[0.2000, 0.4000, 0.6000, 0.8000]]])
    """
    return by_rows(read(query, key, mask, scale, visible, cu_seqlens), lambda weights, share: share)


def _first_tokens(call: CheckedCall, cu_seqlens: Tensor | None, key_positions: Tensor | None) -> Tensor:
    """1 for each key that is the first of its sequence, else 0: (T,) or (B, 1, 1, T)."""
    batch, _, num_queries, _ = call.query.shape
    num_keys, device = call.key.shape[2], call.query.device
    if key_positions is not None:
        check_integers(key_positions, "key_positions")
        check_positions_fit(key_positions, batch, num_keys, device, "key_positions")
        positions = key_positions
    elif num_queries != num_keys:
        raise ValueError(
            f"key_positions are required where query and key lengths differ, got S={num_queries} and T={num_keys}: "
            "pass the position of each key, such as torch.arange(T) for a cache that keeps all of them"
        )
    elif call.mask is None or call.mask.positions is None or cu_seqlens is not None:
        positions = torch.arange(num_keys, device=device)
        if cu_seqlens is not None:
            positions = positions - cu_seqlens[document_of(positions, cu_seqlens)]
    else:
        positions = call.mask.positions
    first = (positions == 0).to(call.log_mass.dtype)
    return first if first.dim() == 1 else first[:, None, None, :]
