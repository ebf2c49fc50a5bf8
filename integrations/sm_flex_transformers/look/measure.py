"""What is measured in a model's layers while it reads rows of a text; only sums over rows are kept.

Dimension letters: L attention layers, H query heads of a layer, S tokens, K kinds, C cells, P groups of positions.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sm_flex.diagnostics import column_shares
from sm_flex.diagnostics.columns import OTHER
from sm_flex_transformers.look import calls, texts
from sm_flex_transformers.look.errors import BadInput

FAR = 64  # slots behind a key from which on a row counts for what the key gets
MAX_CELLS, CELL_BYTES = 48, 2_000_000  # of the pictures of all heads


class LayerShares:
    """Sums over texts of one layer. Shares are those of the rows at least ``far`` slots behind a key.

    first, real (H, P): by groups of positions. first_far, real_far (H,). kinds (H, K). cells (H, C, C).
    other (H,): the largest column but the first, of each text. other_mean: the same of the mean of the heads.
    other_slots: where that column was, of each text.
    """

    def __init__(self, name: str) -> None:
        self.name, self.texts, self.other_slots = name, 0, list[int]()
        self.sums: dict[str, Tensor] = {}

    def add(self, **found: Tensor) -> None:
        self.texts += 1
        for name, x in found.items():
            x = x.double().cpu()
            self.sums[name] = self.sums[name] + x if name in self.sums else x

    def mean(self, name: str) -> Tensor:
        return self.sums[name] / self.texts


class Looked(NamedTuple):
    """layers: their shares. norms: (layers of the model + 1, 3), of the hidden states that enter the first layer and that
    leave each: slot 0's, the largest other slot's and the other slots' median, the mean over texts. The largest is that of all
    texts. positions: the first of each group of positions. far: see LayerShares. losses: name -> (N, S) nats. rows: what was
    read. window, keep: of the windows."""

    layers: list[LayerShares]
    norms: Tensor
    positions: list[int]
    far: int
    losses: dict[str, Tensor]
    rows: texts.Rows
    window: int
    keep: int


class Measure:
    """The attention function that measures; its output is that of the model's own."""

    def __init__(self, length: int, cells: int, on_call: Callable[[], None]) -> None:
        self.far, self.cells, self.on_call = min(FAR, length // 4), cells, on_call
        self.positions = position_groups(length)
        self.groups = torch.bucketize(torch.arange(length), torch.tensor(self.positions), right=True) - 1
        self.layers: list[LayerShares] = []
        self.called, self.kinds = 0, torch.empty(0)

    def begin(self, kinds: Tensor) -> None:
        """Before each row of the text."""
        self.called, self.kinds = 0, kinds

    def __call__(self, attention: calls.Attention, module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        call = calls.read(module, *args, **kwargs)
        if self.called == len(self.layers):
            index = getattr(module, "layer_idx", None)
            self.layers.append(LayerShares(str(self.called if index is None else index)))
        self._add(self.layers[self.called], call)
        self.called += 1
        self.on_call()
        return attention(module, *args, **kwargs)

    def _add(self, layer: LayerShares, call: calls.LayerCall) -> None:
        far, length, device = self.far, call.query.shape[2], call.query.device
        shares = column_shares(
            call.query, call.key, call.mask, scale=call.scale, visible=call.visible, sliding=call.sliding,
            kinds=self.kinds.to(device), apart=far, cells=min(self.cells, length),
        )  # fmt: skip
        assert shares.kinds is not None
        assert shares.cells is not None
        columns = shares.columns[0, :, 1 : length - 2 * far + 1]  # those that at least ``far`` rows count for
        over_heads = columns.mean(0)
        layer.other_slots.append(1 + int(over_heads.argmax()))
        kinds = shares.kinds[0, :, far:].mean(1)
        kinds = torch.cat([kinds, kinds.new_zeros(len(kinds), OTHER + 1 - kinds.shape[1])], 1)
        layer.add(
            first=self._grouped(shares.first[0]), real=self._grouped(shares.real[0]), kinds=kinds, cells=shares.cells[0],
            first_far=shares.first[0, :, far:].mean(1), real_far=shares.real[0, :, far:].mean(1),
            other=columns.amax(1), other_mean=over_heads.amax(),
        )  # fmt: skip

    def _grouped(self, rows_HS: Tensor) -> Tensor:
        """(H, P), the mean over each group of positions."""
        groups = self.groups.to(rows_HS.device)
        sums = rows_HS.new_zeros(len(rows_HS), len(self.positions)).index_add_(1, groups, rows_HS)
        return sums / groups.bincount()


class Window:
    """The attention function that drops the oldest keys, but for kept ones."""

    def __init__(self, window: int, keep: int, on_call: Callable[[], None]) -> None:
        self.window, self.keep, self.on_call = window, keep, on_call

    def __call__(self, attention: calls.Attention, module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        calls.note_call()
        out = calls.windowed(calls.read(module, *args, **kwargs), self.window, self.keep)
        self.on_call()
        return out, None


class Norms:
    """Hooks on the model's layers: (layers + 1, 3) of each text, see Looked."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = _decoder_layers(model)
        self.found: list[list[Tensor]] = []

    @contextlib.contextmanager
    def of_one_text(self) -> Iterator[None]:
        rows: list[Tensor] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows.append(_three(args[0] if args else kwargs["hidden_states"], module))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            rows.append(_three(output[0] if isinstance(output, tuple) else output, module))

        hooks = [self.layers[0].register_forward_pre_hook(enter, with_kwargs=True)]
        hooks += [layer.register_forward_hook(leave) for layer in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.found.append(rows)

    def result(self) -> Tensor:
        found = torch.stack([torch.stack(rows) for rows in self.found])
        return torch.stack([found[..., 0].mean(0), found[..., 1].amax(0), found[..., 2].mean(0)], -1)


def _three(hidden: Any, layer: nn.Module) -> Tensor:
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise NotImplementedError(
            f"{type(layer).__name__} has hidden states of another form than (B, S, D): look cannot read them"
        )
    norms = hidden[0].detach().float().norm(dim=-1).cpu()
    return torch.stack([norms[0], norms[1:].max(), norms[1:].median()])


def _decoder_layers(model: Any) -> nn.ModuleList:
    count = model.config.get_text_config().num_hidden_layers
    found = [x for x in model.modules() if isinstance(x, nn.ModuleList) and len(x) == count]
    if not found:
        raise BadInput(f"{type(model).__name__} has no list of its {count} layers, so that look cannot read its hidden states")
    return found[0]


def position_groups(length: int) -> list[int]:
    """The first position of each group: single ones, then four groups an octave."""
    edges = {0, *(round(2 ** (k / 4)) for k in range(4 * max(1, math.ceil(math.log2(max(2, length)))) + 1))}
    return sorted(edge for edge in edges if edge < length)


def cells_for(heads: int, length: int) -> int:
    """Rows and columns of the picture of a head: fewer where a model has so many heads that the page would grow too large."""
    return max(2, min(MAX_CELLS, length, math.isqrt(CELL_BYTES // max(1, heads))))
