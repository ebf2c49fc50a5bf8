"""What benchmarks.lm measures of a training run beside its loss: where attention goes, and longer texts."""

from typing import Any

import torch

from benchmarks.lm.model import Decoder
from benchmarks.lm.train import TrainingRun, low_precision
from sm_flex import diagnostics

TIMES = (1, 2, 4, 8)  # the training length
TEXTS_FOR_SHARES = 32
AT_ONCE = 4  # texts
MAP_TOKENS = 32


@torch.no_grad()
def measure(run: TrainingRun) -> dict[str, Any]:
    saved = run.load()
    assert saved is not None, "only a run that was trained is measured"
    model = run.new_model()
    model.load_state_dict(saved["model"])
    first, pseudo = shares(run, model)
    return {
        "first_token_share": first,
        "pseudo_share": pseudo,
        "extrapolation": extrapolation(run, model),
        "maps": maps(run, model) if run.seed == 0 and run.variant.name in ("causal", "stablemask") else None,
    }


def share_positions(length: int) -> list[int]:
    """1, 2, 4, ... and the last: how many tokens of the text a query has before it."""
    return [2**i for i in range((length - 1).bit_length()) if 2**i < length - 1] + [length - 1]


def shares(run: TrainingRun, model: Decoder) -> tuple[list[list[float]] | None, list[list[float]] | None]:
    """Attention to the text's first token (Figure 1b), and to no token of it (the mass, or the artificial token).

    By layer and share_positions, mean over heads and texts.
    """
    texts = run.corpus.long_texts(run.size.length, TEXTS_FOR_SHARES)
    if not len(texts):
        return None, None
    lead = 0 if run.lead is None else 1
    at = torch.tensor(share_positions(run.size.length)) + lead
    sums = torch.zeros(2, run.size.layers, len(at), dtype=torch.float64)
    for rows in texts.split(AT_ONCE):
        for layer, map_RHSS in enumerate(attention_maps(run, model, rows)):
            real_RHP = map_RHSS[:, :, at, lead:].sum(-1)
            sums[0, layer] += map_RHSS[:, :, at, lead].double().mean(1).sum(0).cpu()
            sums[1, layer] += (1 - real_RHP).double().mean(1).sum(0).cpu()
    first, pseudo = (sums / len(texts)).tolist()
    return first, pseudo


def attention_maps(run: TrainingRun, model: Decoder, rows_RL: torch.Tensor) -> list[torch.Tensor]:
    """(R, H, S, S) of each layer: real probabilities after the remask. Rows are of single documents."""
    batch = run.pack(rows_RL)
    layers = model.attentions
    for layer in layers:
        layer.watch = []
    with low_precision(run.device):
        model(batch)
    maps = []
    for layer in layers:
        assert layer.watch is not None
        q, k = [x.float() for x in layer.watch[0]]
        layer.watch = None
        mask = layer.mass(torch.arange(q.shape[2], device=q.device), layer.alibi if model.position == "alibi" else None)
        maps.append(diagnostics.attention_map(q, k, mask))
    return maps


def maps(run: TrainingRun, model: Decoder) -> list[dict[str, Any]] | None:
    """Every head of the second and the last layer on a text's first tokens, as rows of the lower triangle."""
    texts = run.corpus.long_texts(run.size.length, 1)
    if not len(texts):
        return None
    chosen = sorted({min(1, run.size.layers - 1), run.size.layers - 1})
    tokens = min(MAP_TOKENS, run.size.length)
    maps_RHSS = attention_maps(run, model, texts)
    return [
        {
            "layer": layer, "head": head, "tokens": tokens,
            "rows": [[round(x, 4) for x in maps_RHSS[layer][0, head, i, : i + 1].tolist()] for i in range(tokens)],
        }
        for layer in chosen
        for head in range(run.size.heads)
    ]  # fmt: skip


def extrapolation(run: TrainingRun, model: Decoder) -> dict[str, Any] | None:
    """Perplexity of texts longer than the training's, with attention to the N most recent keys (Figure 4d).

    At x times N: of the tokens between half of x N and x N. None where no validation document is long enough.
    """
    length, lead = run.size.length, 0 if run.lead is None else 1
    for times in (TIMES[:n] for n in range(len(TIMES), 0, -1)):
        texts = run.corpus.long_texts(times[-1] * length, run.size.long_texts)
        if len(texts):
            break
    else:
        return None
    kept = {}
    for count in run.variant.kept:
        losses = []
        for rows in texts.split(AT_ONCE):
            batch = run.pack(rows)
            losses.append(run.losses(model, batch, window=length, kept=count).unflatten(0, (len(rows), -1))[:, lead:])
        mean_S = torch.cat(losses).double().mean(0)
        kept[str(count)] = [mean_S[x * length // 2 : x * length].mean().exp().item() for x in times]
    return {"times": list(times), "texts": len(texts), "kept": kept}
