"""The figures of a look as one JSON object, and what they say in sentences."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import sm_flex
from sm_flex_transformers import settings
from sm_flex_transformers.look.measure import Looked
from sm_flex_transformers.look.run import ALL, KEPT, WINDOW

MUCH = 0.3  # a head that gives its first token more than this is counted as one with a sink


def report_of(looked: Looked, model: Any, tokenizer: Any, model_name: str, text_name: str) -> dict[str, Any]:
    """Shares by layer and head are means over the rows at least ``far`` slots behind a key, and over the texts."""
    layers, rows = looked.layers, looked.rows
    config = model.config.get_text_config()
    first, real, other = ([layer.mean(name) for layer in layers] for name in ("first_far", "real_far", "other"))
    kinds = [layer.mean("kinds") for layer in layers]
    worst = max(range(len(layers)), key=lambda i: float(layers[i].mean("other_mean")))
    counts = rows.kinds[:, looked.far :].flatten().bincount(minlength=3).double()
    counts[0] = len(rows.kinds)
    return {
        "model": model_name, "text": text_name,
        "attention": config._attn_implementation, "stablemask": settings.of(config),
        "tokens": {
            "rows": len(rows.ids), "length": rows.kinds.shape[1], "far": looked.far, "window": looked.window, "kept": looked.keep,
        },
        "layers": [layer.name for layer in layers], "heads": [len(x) for x in first],
        "positions": looked.positions,
        "first": {
            "mean": _mean(first), "by_head": _rounded(first), "heads_above": sum(int((x > MUCH).sum()) for x in first),
            "above": MUCH, "by_position": [_rounded(layer.mean("first")) for layer in layers],
        },
        "kinds": {
            "names": ["first", "punctuation", "other"], "by_head": _rounded(kinds),
            "mean": [_mean([x[:, kind] for x in kinds]) for kind in range(3)],
            "of_tokens": _rounded(counts / counts.sum()),
        },
        "real": {
            "mean": _mean(real), "by_head": _rounded(real),
            "by_position": [_rounded(layer.mean("real").mean(0)) for layer in layers],
        },
        "other_column": {
            "by_head": _rounded(other), "by_layer": [_number(layer.mean("other_mean")) for layer in layers],
            "slots": [layer.other_slots for layer in layers],
            "tokens": [
                [tokenizer.decode([int(ids[slot])]) for ids, slot in zip(rows.ids, layer.other_slots, strict=True)]
                for layer in layers
            ],
            "largest": {"layer": layers[worst].name, "share": _number(layers[worst].mean("other_mean"))},
        },
        "norms": {name: _rounded(looked.norms[:, i], 5) for i, name in enumerate(("first", "largest_other", "median_other"))},
        "perplexity": {name: _perplexity(looked, name) for name in (ALL, WINDOW, KEPT)},
        "versions": {"sm_flex": sm_flex.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip


def sentences(report: dict[str, Any]) -> list[str]:
    """What the figures say."""
    first, norms, tokens = report["first"], report["norms"], report["tokens"]
    heads = sum(report["heads"])
    by_layer = layer_means(first["by_head"])
    top = max(range(len(by_layer)), key=by_layer.__getitem__)
    found = [
        f"The first token gets {_percent(first['mean'])} of the attention; in layer {report['layers'][top]}, where it gets most, "
        f"{_percent(by_layer[top])}. {first['heads_above']} of {heads} heads give it more than {100 * first['above']:.0f} %."
    ]
    other = report["other_column"]["largest"]
    found.append(
        f"The largest share of any other column, as a mean over the heads of a layer, is {_percent(other['share'])} (layer "
        f"{other['layer']})."
    )
    ratios = [a / max(b, 1e-12) for a, b in zip(norms["first"], norms["largest_other"], strict=True)]
    at = max(range(len(ratios)), key=ratios.__getitem__)
    found.append(
        f"The norm of the first token's hidden state reaches {max(norms['first']):,.0f}; of any other's, "
        f"{max(norms['largest_other']):,.0f}. Their ratio is largest {after_layer(at)}: {ratios[at]:,.1f}."
    )
    if report["real"]["mean"] < 0.9995:
        found.append(f"{_percent(report['real']['mean'])} of the attention goes to real tokens, the rest to the mass.")
    whole, window, kept = (report["perplexity"][name]["late_perplexity"] for name in (ALL, WINDOW, KEPT))
    found.append(
        f"Perplexity of the tokens from {report['perplexity'][ALL]['late_from']} on: {whole:.1f} with all keys, {window:.1f} in "
        f"a window of {tokens['window']}, {kept:.1f} in that window with the first {tokens['kept']} kept."
    )
    return found


def after_layer(index: int) -> str:
    return "before the first layer" if index == 0 else f"after layer {index - 1}"


def layer_means(by_head: list[list[float]]) -> list[float]:
    return [sum(x) / len(x) for x in by_head]


def save(report: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _perplexity(looked: Looked, name: str) -> dict[str, Any]:
    losses = looked.losses[name].double()
    late = max(looked.window, losses.shape[1] // 2)  # the first token has left the window
    found = {"nats": losses.mean().item(), "late_nats": losses[:, late:].mean().item(), "late_from": late}
    found |= {"perplexity": _exp(found["nats"]), "late_perplexity": _exp(found["late_nats"])}
    return {key: x if isinstance(x, int) else _number(torch.tensor(x, dtype=torch.float64), 6) for key, x in found.items()}


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _mean(layers: list[Tensor]) -> float:
    """Over all heads of all layers."""
    return _number(torch.cat(layers).mean())


def _number(x: Tensor, digits: int = 4) -> Any:
    """None where it is no number that JSON knows."""
    value = float(x)
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _rounded(x: Any, digits: int = 4) -> Any:
    if isinstance(x, Tensor) and x.dim() == 0:
        return _number(x, digits)
    return [_rounded(part, digits) for part in x]
