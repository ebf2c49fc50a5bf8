"""A made-up record of benchmarks.lm: plausible shapes, so that what is drawn of it can be looked at.

Numbers differ between variants, seeds, layers, positions and heads, so that a mix-up shows.
"""

import math
import statistics
from typing import Any

VARIANTS = {
    "causal": "causal",
    "stablemask": "StableMask, head-wise",
    "stablemask-0.5": "StableMask, gamma 0.5",
    "pseudo-0": "pseudo value 0",
    "pseudo-0.01": "pseudo value 0.01",
    "token-fixed": "fixed artificial token",
    "token-learned": "learned artificial token",
    "sink-learned": "learned sink per head",
}
POSITIONS = [1, 2, 4, 8, 16, 32, 64, 128, 255]
TIMES = [1, 2, 4, 8]


def spread(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values), "values": values}


def variant(number: int, name: str, seeds: int, layers: int, parameters: int, tokens: int = 32) -> dict[str, Any]:
    final = [1.31 + 0.004 * math.sin(5 * number) + 0.003 * math.sin(3 * seed + number) for seed in range(seeds)]
    steps = list(range(100, 1001, 100))
    lead = 0.02 * math.sin(number)
    curve = [[loss + 0.9 * math.exp(-step / 250) + lead * (1 - step / 1000) ** 2 for step in steps] for loss in final]
    sink = 0.5 if name == "causal" else 0.5 / (2 + number)

    def share(layer: int, position: int) -> float:
        return sink * (0.7 + 0.1 * layer) + (1 - sink) / (position + 1)

    def window(time: int, seed: int, kept: str) -> float:
        lost = 60 * (time - 1) ** 0.7 if name == "causal" and kept == "0" else 0.3 * number * math.log2(time)
        return 40 + number / 2 + lost + 0.8 * math.sin(seed + time)

    kept = {"causal": ["0", "4"], "token-learned": ["1"]}.get(name, ["0"])
    record = {
        "label": VARIANTS[name],
        "seeds": list(range(seeds)),
        "loss": spread(final),
        "perplexity": spread([math.exp(2.83 * loss) * (1e6 / parameters) ** 0.07 for loss in final]),
        "curve": {"steps": steps, "loss": curve},
        "first_token_share": {"positions": POSITIONS, "by_layer": [[share(x, p) for p in POSITIONS] for x in range(layers)]},
        "pseudo_share": {
            "positions": POSITIONS,
            "by_layer": [
                [0.0 if not number else 0.8 / (1 + p * number / (20 + 9 * x)) for p in POSITIONS] for x in range(layers)
            ],
        },
        "extrapolation": {
            "times": TIMES,
            "kept": {k: {"perplexity": [[window(t, seed, k) for t in TIMES] for seed in range(seeds)]} for k in kept},
        },
        "tokens_per_s": spread([15000.0 + 100 * number + seed for seed in range(seeds)]),
        "peak_memory_mib": spread([700.0 + number] * seeds),
    }
    if name in ("causal", "stablemask"):
        heads = [(layer, head) for layer in range(min(2, layers)) for head in range(4)]
        record["maps"] = [attention(number, layer, head, tokens) for layer, head in heads]
    return record


def attention(number: int, layer: int, head: int, tokens: int) -> dict[str, Any]:
    """Rows of probabilities: a sink, a diagonal of some width, and with StableMask less than 1 in all."""
    rows = []
    for i in range(tokens):
        scores = [math.exp(-abs(i - j - head) / (1 + layer)) + (2 if j == 0 else 0) for j in range(i + 1)]
        mass = 0 if not number else 6 * 2.0 ** (-(head + 1) * i / 12)
        rows.append([score / (sum(scores) + mass) for score in scores])
    return {"layer": layer, "head": head, "tokens": tokens, "rows": rows}


def record(names: list[str] | None = None, seeds: int = 3, layers: int = 4, parameters: int = 1_060_000) -> dict[str, Any]:
    names = list(VARIANTS) if names is None else names
    config = {
        "preset": "tiny", "layers": layers, "width": 128, "heads": 4, "length": 256, "position": "rope", "steps": 1000,
        "seeds": list(range(seeds)), "window": 256, "text": "debian-reference", "parameters": parameters,
    }  # fmt: skip
    variants = {name: variant(list(VARIANTS).index(name), name, seeds, layers, parameters) for name in names}
    return {"benchmark": "lm", "config": config, "variants": variants}
