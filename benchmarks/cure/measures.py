"""What is measured of a model, always on the same held-out rows: losses by who sees whom, and where attention goes.

Shapes in names: R rows, L layers, H heads, S slots of a row.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cure.model import attentions, mass_of, watching
from benchmarks.cure.variants import EVICTED
from benchmarks.cure.views import WHOLE, View, mask_of
from sm_flex.diagnostics import attention_map

KEPT = 4  # first tokens that StreamingLLM keeps
LOOKED_AT = 8  # rows of which attention and norms are read
COLUMNS = 33  # first slots of the figure
LOGITS_AT_ONCE = 256


def views_of(own: View, window: int) -> dict[str, View]:
    """By what they are called in the record; own is how the variant was trained."""
    return {
        "own": own, "whole": WHOLE, "window": View(window), "window+4": View(window, KEPT), "evicted": View(evict=EVICTED),
    }  # fmt: skip


@torch.no_grad()
def losses(model: Any, rows_RL: Tensor, view: View, looked: "Looked | None" = None) -> Tensor:
    """(R, S) nats of each target; the first rows are looked at, too."""
    mask = mask_of(view, rows_RL.shape[1] - 1, rows_RL.device)
    found = []
    for i, row_L in enumerate(rows_RL):
        seen = looked if looked is not None and i < LOOKED_AT else None
        found.append(_row_losses(model, row_L, mask, seen))
    return torch.stack(found)


def _row_losses(model: Any, row_L: Tensor, mask: Tensor | None, looked: "Looked | None") -> Tensor:
    given = {"attention_mask": mask, "use_cache": False}
    if looked is None:
        hidden = model.model(row_L[None, :-1], **given).last_hidden_state[0]
    else:
        with watching(looked.attention):
            out = model.model(row_L[None, :-1], **given, output_hidden_states=True)
        hidden = out.last_hidden_state[0]
        looked.norms(out.hidden_states)
    parts = zip(hidden.split(LOGITS_AT_ONCE), row_L[1:].split(LOGITS_AT_ONCE), strict=True)
    return torch.cat([F.cross_entropy(model.lm_head(x), target, reduction="none") for x, target in parts])


class Looked:
    """Where attention goes and how large hidden states are, in a few rows of text: the mean of shares, the median of norms.

    Rows of the matrix from a quarter on count for shares, from a half on for columns: before, every column is large.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.shares: list[list[Tensor]] = [[] for _ in range(layers)]  # (H,) of the first token
        self.pseudo: list[list[Tensor]] = [[] for _ in range(layers)]  # (H,) of no token
        self.columns: list[list[Tensor]] = [[] for _ in range(layers)]  # (S,) mean over heads
        self.norms_LS: list[Tensor] = []

    def attention(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        weights_HSS = attention_map(query, key, mass_of(module, query.device), scale=module.scaling, visible=mask)[0]
        late = weights_HSS[:, weights_HSS.shape[1] // 4 :]
        self.shares[module.layer_idx].append(late[:, :, 0].mean(1))
        self.pseudo[module.layer_idx].append(1 - late.sum(-1).mean(1))
        self.columns[module.layer_idx].append(weights_HSS[:, weights_HSS.shape[1] // 2 :].mean((0, 1)))

    def norms(self, hidden_states: Sequence[Tensor]) -> None:
        """The last one is normalised, and the first the embedding."""
        self.norms_LS.append(torch.stack([x[0].float().norm(dim=-1) for x in hidden_states[1:-1]]))

    def result(self) -> dict[str, Any]:
        """Shares by layer; columns of the layers with sinks (the last 3/5); norms, the largest of all layers."""
        share_LH = torch.stack([torch.stack(x).mean(0) for x in self.shares])
        pseudo_L = torch.stack([torch.stack(x).mean() for x in self.pseudo])
        columns_S = torch.stack([torch.stack(x).mean(0) for x in self.columns])[self.layers * 2 // 5 :].mean(0)
        others = columns_S[1 : len(columns_S) // 2 - 8]  # keys that every row of the mean sees, but the most recent
        norms_RS = torch.stack(self.norms_LS).amax(1)
        largest, slots = norms_RS[:, 1:].max(1)
        middle = largest.argsort()[(len(largest) - 1) // 2]
        return {
            "share_by_layer": share_LH.mean(1).tolist(), "share": share_LH.mean().item(),
            "share_late_layers": share_LH[self.layers * 2 // 5 :].mean().item(), "pseudo_by_layer": pseudo_L.tolist(),
            "columns": columns_S[:COLUMNS].tolist(), "largest_column": [1 + int(others.argmax()), others.max().item()],
            "norm_first": norms_RS[:, 0].median().item(),
            "norm_other": [1 + int(slots[middle]), largest[middle].item()], "norm_other_by_row": largest.tolist(),
            "norm_median": torch.stack(self.norms_LS).median().item(),
        }  # fmt: skip


def by_row(losses_RS: Tensor) -> dict[str, list[float]]:
    """The mean of each row, and of its second half."""
    half = losses_RS.shape[1] // 2
    return {"all": losses_RS.mean(1).tolist(), "late": losses_RS[:, half:].mean(1).tolist()}


def measure(model: Any, rows_RL: Tensor, own: View, window: int) -> dict[str, Any]:
    """Losses in each view; where attention goes in the own view and in the whole one."""
    found: dict[View, dict[str, list[float]]] = {}
    looks: dict[View, dict[str, Any]] = {}
    views = views_of(own, window)
    for view in views.values():
        if view not in found:
            looked = Looked(len(attentions(model))) if view in (own, WHOLE) else None
            found[view] = by_row(losses(model, rows_RL, view, looked))
            if looked is not None:
                looks[view] = looked.result()
    return {"losses": {name: found[view] for name, view in views.items()}, "own": looks[own], "whole": looks[WHOLE]}


def stream(model: Any, rows_RL: Tensor, views: Mapping[str, View], block: int) -> dict[str, list[list[float]]]:
    """By view and row: the mean of each block of so many tokens."""
    return {name: losses(model, rows_RL, view).unfold(1, block, block).mean(-1).tolist() for name, view in views.items()}


def paired(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean difference, and its standard error over the rows: of each order of training the means of the same rows."""
    differences = [statistics.fmean(x) for x in zip(*[_minus(a, b) for a, b in zip(ours, theirs, strict=True)], strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return statistics.fmean(differences), error


def _minus(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(ours, theirs, strict=True)]
