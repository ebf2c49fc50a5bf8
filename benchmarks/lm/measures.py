"""What benchmarks.lm measures of a trained piece beside its loss: where attention goes, and what longer texts do to it."""

from typing import Any

import torch

from benchmarks.lm.model import Decoder
from benchmarks.lm.train import Piece, low_precision
from sm_flex import diagnostics

TIMES = (1, 2, 4, 8)  # the training length
TEXTS_FOR_SHARES = 32
AT_ONCE = 4  # texts
MAP_TOKENS = 32


@torch.no_grad()
def measure(piece: Piece) -> dict[str, Any]:
    saved = piece.load()
    assert saved is not None, "only a piece that was trained is measured"
    model = piece.new_model()
    model.load_state_dict(saved["model"])
    first, pseudo = shares(piece, model)
    return {
        "first_token_share": first,
        "pseudo_share": pseudo,
        "extrapolation": extrapolation(piece, model),
        "maps": maps(piece, model) if piece.seed == 0 and piece.variant.name in ("causal", "stablemask") else None,
    }


def share_positions(length: int) -> list[int]:
    """1, 2, 4, ... and the last: how many tokens of the text a query has before it."""
    return [2**i for i in range((length - 1).bit_length()) if 2**i < length - 1] + [length - 1]


def shares(piece: Piece, model: Decoder) -> tuple[list[list[float]] | None, list[list[float]] | None]:
    """By layer and share_positions, mean over heads and texts: the attention that the text's first token gets (Figure 1b), and
    what goes to no token of the text: to the mass, or to the artificial token."""
    texts = piece.corpus.long_texts(piece.size.length, TEXTS_FOR_SHARES)
    if not len(texts):
        return None, None
    lead = 0 if piece.lead is None else 1
    at = torch.tensor(share_positions(piece.size.length)) + lead
    sums = torch.zeros(2, piece.size.layers, len(at), dtype=torch.float64)
    for rows in texts.split(AT_ONCE):
        for layer, map_RHSS in enumerate(attention_maps(piece, model, rows)):
            real_RHP = map_RHSS[:, :, at, lead:].sum(-1)
            sums[0, layer] += map_RHSS[:, :, at, lead].double().mean(1).sum(0).cpu()
            sums[1, layer] += (1 - real_RHP).double().mean(1).sum(0).cpu()
    first, pseudo = (sums / len(texts)).tolist()
    return first, pseudo


def attention_maps(piece: Piece, model: Decoder, rows_RL: torch.Tensor) -> list[torch.Tensor]:
    """(R, H, S, S) of each layer: real probabilities after the remask. Rows are single pieces of text."""
    batch = piece.pack(rows_RL)
    layers = model.attentions
    for layer in layers:
        layer.watch = []
    with low_precision(piece.device):
        model(batch)
    maps = []
    for layer in layers:
        assert layer.watch is not None
        q, k = [x.float() for x in layer.watch[0]]
        layer.watch = None
        mask = layer.mass(torch.arange(q.shape[2], device=q.device), layer.alibi if model.position == "alibi" else None)
        maps.append(diagnostics.attention_map(q, k, mask))
    return maps


def maps(piece: Piece, model: Decoder) -> list[dict[str, Any]] | None:
    """Every head of the second and of the last layer on the first tokens of a text, as rows of the lower triangle."""
    texts = piece.corpus.long_texts(piece.size.length, 1)
    if not len(texts):
        return None
    chosen = sorted({min(1, piece.size.layers - 1), piece.size.layers - 1})
    tokens = min(MAP_TOKENS, piece.size.length)
    maps_RHSS = attention_maps(piece, model, texts)
    return [
        {
            "layer": layer, "head": head, "tokens": tokens,
            "rows": [[round(x, 4) for x in maps_RHSS[layer][0, head, i, : i + 1].tolist()] for i in range(tokens)],
        }
        for layer in chosen
        for head in range(piece.size.heads)
    ]  # fmt: skip


def extrapolation(piece: Piece, model: Decoder) -> dict[str, Any] | None:
    """Perplexity of texts longer than those of the training, where attention keeps the N most recent keys (Figure 4d).

    At x times N: of the tokens between half of x N and x N. None where no validation document is long enough.
    """
    length, lead = piece.size.length, 0 if piece.lead is None else 1
    times = next((TIMES[:n] for n in range(len(TIMES), 0, -1) if _texts(piece, TIMES[:n]) is not None), None)
    if times is None:
        return None
    texts = _texts(piece, times)
    assert texts is not None
    kept = {}
    for count in piece.variant.kept:
        losses = []
        for rows in texts.split(AT_ONCE):
            batch = piece.pack(rows)
            with low_precision(piece.device):
                losses.append(model.losses(batch, window=length, kept=count).unflatten(0, (len(rows), -1))[:, lead:])
        mean_S = torch.cat(losses).double().mean(0)
        kept[str(count)] = [mean_S[x * length // 2 : x * length].mean().exp().item() for x in times]
    return {"times": list(times), "texts": len(texts), "kept": kept}


def _texts(piece: Piece, times: tuple[int, ...]) -> torch.Tensor | None:
    texts = piece.corpus.long_texts(times[-1] * piece.size.length, piece.size.long_texts)
    return texts if len(texts) else None
