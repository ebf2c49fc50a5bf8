"""What each key gets: the columns of eq. 11's matrix, in one pass over blocks of its rows.

Dimension letters: B sequences, H query heads, S queries, T keys, K kinds of token, C cells.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sm_flex.checks.mask import check_integers
from sm_flex.diagnostics.calls import CheckedCall, check_count, read
from sm_flex.engines import dense
from sm_flex.epilogue.formula import real_share_and_lse
from sm_flex.runtime import no_autocast
from sm_flex.score_mod import StableMask
from sm_flex.visibility.rows import VisibleRows

FIRST, PUNCTUATION, OTHER = range(3)


class ColumnShares(NamedTuple):
    """Shares of the attention, float32 (float64 for float64 inputs).

    first: (B, H, S), of each row, to the key in slot 0.
    real: (B, H, S), of each row, to real tokens (alpha of section 4.2): 1 without a mass.
    columns: (B, H, T), to each key, the mean over the rows at least ``apart`` slots behind it; NaN where there is no such row.
    kinds: (B, H, S, K), of each row, to each kind of key; None where no kinds were given. Their sum is real.
    cells: (B, H, C, C), the matrix in C x C cells: the mean of the weights that causality allows in each, 0 where it allows
        none. The first row and column are slot 0's own, the others cover equal parts of the rest. None where not asked for.
    """

    first: Tensor
    real: Tensor
    columns: Tensor
    kinds: Tensor | None
    cells: Tensor | None


def column_shares(
    query: Tensor,
    key: Tensor,
    mask: StableMask | None,
    *,
    scale: float | None = None,
    visible: Tensor | BlockMask | None = None,
    sliding: int | None = None,
    kinds: Tensor | None = None,
    apart: int = 0,
    cells: int | None = None,
) -> ColumnShares:
    """Where the attention goes, by column: to the first key, to each other, to kinds of keys; and the real share.

    All of it is read from :func:`attention_map`, of which only some rows are held at a time: the memory beside the arguments
    is linear in S. One sequence a row: no padding, no packed documents.

    Args:
        query, key, mask, scale, visible: as for attention_map. S = T: whole sequences.
        sliding: the sliding window of the layer: how many of the most recent keys a row sees, its own included. As a
            tensor visible would hold S x S.
        kinds: (T,) integers >= 0, the kind of each key (:func:`token_kinds`), or None.
        apart: how many slots a row must be behind a key to count for the key's mean. A token's own neighbours always look at
            it; a sink is looked at from far.
        cells: the number C of rows and columns of the small picture of the matrix, at most S; None for no picture.

    Raises:
        TypeError, ValueError, NotImplementedError: as the drop-ins, naming the argument, the rule, what came
            and the way out.

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 4)
        >>> shares = column_shares(q, k, None, kinds=torch.tensor([0, 2, 1, 2]), apart=1)
        >>> shares.first
        tensor([[[1.0000, 0.5000, 0.3333, 0.2500]]])
        >>> shares.columns  # key 2 is seen from far enough by the last row alone
        tensor([[[0.3611, 0.2917, 0.2500,    nan]]])
        >>> shares.kinds[0, 0, 3]
        tensor([0.2500, 0.2500, 0.5000])
    """
    call = read(query, key, mask, scale, visible, None)
    batch, heads, length, _ = call.query.shape
    _check(call, sliding, kinds, apart, cells)
    if sliding is not None:
        call = call._replace(rows=_within(call.rows, sliding, length, call.query.device))
    device, dtype = call.query.device, call.log_mass.dtype
    slots = torch.arange(length, device=device)
    to_kinds = 0 if kinds is None else int(kinds.max()) + 1
    parts = [(slots == 0).unsqueeze(1)]  # what a row of weights is multiplied by, for all its sums at once
    if kinds is not None:
        parts.append(kinds.unsqueeze(1) == torch.arange(to_kinds, device=device))
    cell_of = None if cells is None else cell_of_slots(length, cells, device)
    if cells is not None and cell_of is not None:
        parts.append(cell_of.unsqueeze(1) == torch.arange(cells, device=device))
    sums_TX = torch.cat(parts, 1).to(dtype)

    real = torch.empty(batch, heads, length, dtype=dtype, device=device)
    sums = torch.empty(batch, heads, length, 1 + to_kinds, dtype=dtype, device=device)
    columns = torch.zeros(batch, heads, length, dtype=dtype, device=device)
    picture = None if cells is None else torch.zeros(batch, heads, cells, cells, dtype=dtype, device=device)
    ordered = mask is None or mask.ordered
    score_mod = None if mask is None else mask.score_mod
    with torch.no_grad(), no_autocast(device):
        weigh, wide_k = dense.weights_by_rows(call.rows, scale=call.scale, score_mod=score_mod), call.key.to(dtype)
        for start, end in dense.row_blocks(batch, heads, length, length):
            keys = end if ordered else length
            weights, lse = weigh(call.query[:, :, start:end], wide_k[:, :, :keys], start)
            share = real_share_and_lse(lse, call.log_mass[..., start:end], return_lse=False)[0]
            weights *= share.unsqueeze(-1)
            real[:, :, start:end] = share
            found = weights @ sums_TX[:keys]
            sums[:, :, start:end] = found[..., : 1 + to_kinds]
            if picture is not None and cell_of is not None:
                picture.index_add_(2, cell_of[start:end], found[..., 1 + to_kinds :])
            columns[:, :, :keys] += weights.tril_(start - apart).sum(2)
    columns /= (length - slots - apart).clamp(min=0)  # 0 / 0 is NaN
    if picture is not None and cell_of is not None:
        picture /= _pairs(cell_of, picture.shape[-1]).clamp(min=1)
    return ColumnShares(sums[..., 0], real, columns, None if kinds is None else sums[..., 1:], picture)


def token_kinds(tokens: Sequence[str]) -> Tensor:
    """The kind of each token of a sequence, for :func:`column_shares`: 0 the first, 1 punctuation, 2 any other.

    Args:
        tokens: their texts, in order. Punctuation is a token all of whose characters are neither letters nor digits (Unicode's),
            white space included, and an empty text; but part of a character, which decodes to U+FFFD, is none.

    Returns:
        (T,) int64.

    Raises:
        TypeError: tokens are no list of texts.

    Example:
        >>> token_kinds(["The", " cat", ",", " 9", " .\\n"])
        tensor([0, 2, 1, 2, 1])
    """
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        raise TypeError("tokens must be the texts of the tokens, one str each: decode the ids one by one")
    found = [OTHER if any(c.isalnum() or c == "\ufffd" for c in token) else PUNCTUATION for token in tokens]
    return torch.tensor([FIRST, *found[1:]][: len(found)], dtype=torch.long)


def cell_of_slots(length: int, cells: int, device: torch.device | None = None) -> Tensor:
    """(S,), which of the C cells each slot is in: slot 0 in cell 0, the others in equal parts."""
    slots = torch.arange(length, device=device)
    return torch.where(slots == 0, 0, 1 + (slots - 1) * (cells - 1) // max(1, length - 1))


def _within(rows: VisibleRows, sliding: int, length: int, device: torch.device) -> VisibleRows:
    slots = torch.arange(length, device=device)
    return lambda start, end: rows(start, end) & (slots > torch.arange(start, end, device=device).unsqueeze(1) - sliding)


def _pairs(cell_of: Tensor, cells: int) -> Tensor:
    """(C, C), how many pairs (row, column <= row) each cell holds."""
    sizes = torch.bincount(cell_of, minlength=cells)
    begins = sizes.cumsum(0) - sizes
    rows = torch.arange(len(cell_of), device=cell_of.device).unsqueeze(1)
    seen_SC = (rows + 1 - begins).clamp(min=0).minimum(sizes)
    return torch.zeros(cells, cells, dtype=seen_SC.dtype, device=cell_of.device).index_add_(0, cell_of, seen_SC)


def _check(call: CheckedCall, sliding: int | None, kinds: Tensor | None, apart: int, cells: int | None) -> None:
    length, num_keys = call.query.shape[2], call.key.shape[2]
    if length != num_keys:
        raise ValueError(
            f"column_shares takes whole sequences, got S={length} queries and T={num_keys} keys: look at one full pass, "
            "without a cache"
        )
    check_count("sliding", sliding, 1)
    check_count("apart", apart, 0)
    if kinds is not None:
        check_integers(kinds, "kinds")
        if kinds.shape != (num_keys,) or kinds.device != call.query.device:
            raise ValueError(
                f"kinds must be ({num_keys},) on {call.query.device}, one for each key, got {tuple(kinds.shape)} on "
                f"{kinds.device}"
            )
        if num_keys == 0 or int(kinds.min()) < 0:
            raise ValueError("kinds must be >= 0, one for each of at least one key: number them from 0")
    if cells is not None and (isinstance(cells, bool) or not isinstance(cells, int) or not 1 <= cells <= max(1, length)):
        raise ValueError(
            f"cells must be an int from 1 to S={length}, got {cells!r}: the picture has no more rows than the matrix"
        )
    if cells == 1 and length > 1:
        raise ValueError("cells must be at least 2 where S > 1: slot 0 has a cell of its own")
