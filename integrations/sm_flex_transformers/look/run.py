"""A model looked at: one pass that measures, one for each window."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sm_flex_transformers.look import calls, texts
from sm_flex_transformers.look.errors import BadInput
from sm_flex_transformers.look.losses import losses_through, runs_in_pieces
from sm_flex_transformers.look.measure import Looked, Measure, Norms, Window, cells_for

ALL, WINDOW, KEPT = "all keys", "window", "window, first kept"


def look(
    model: Any,
    tokenizer: Any,
    text: str | None = None,
    *,
    length: int | None = None,
    rows: int = texts.ROWS,
    window: int = 128,
    keep: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Looked:
    """Where a model's attention goes on a text, and what is left of its perplexity when its first tokens leave a window.

    The model is read in evaluation mode, on rows of one sequence each without padding, and left as it was. At no time is an
    S x S tensor made that the model does not make itself (eager does).

    Args:
        model: a causal model of Transformers with any attention of its interface.
        tokenizer: the model's.
        text: what it reads; the bundled one where None (:mod:`sm_flex_transformers.look.texts`).
        length: tokens of a row, S; 512, or fewer where the text or the model has no more, where None.
        rows: how many rows, evenly spread over the text.
        window: the most recent keys that a row sees in the windows; below length.
        keep: how many first tokens the second window keeps (StreamingLLM).
        progress: called after each layer with the calls that are done, and with all there will be.

    Raises:
        BadInput: a text too short, a row longer than the model's positions, a model without attention layers to look at.
        NotImplementedError: an encoder, or a layer that look cannot read; it is named.
    """
    for name, x in (("rows", rows), ("window", window), ("keep", keep), ("length", length)):
        if x is not None and (isinstance(x, bool) or not isinstance(x, int) or x < 1):
            raise BadInput(f"{name} must be an int >= 1, got {x!r}")
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise NotImplementedError(f"{type(model).__name__} is an encoder-decoder: look takes decoder-only causal models")
    found = texts.rows_of(tokenizer, texts.bundled() if text is None else text, config, length, rows, window)
    with calls.evaluating(model):
        return _look(model, config, found, window, keep, progress or (lambda done, total: None))


def _look(model: Any, config: Any, rows: texts.Rows, window: int, keep: int, progress: Callable[[int, int], None]) -> Looked:
    length, device = rows.ids.shape[1] - 1, model.get_input_embeddings().weight.device
    heads, layers = getattr(config, "num_attention_heads", 1), config.num_hidden_layers
    done = 0

    def on_call() -> None:
        nonlocal done
        done += 1
        progress(done, 3 * len(rows.ids) * per_row)

    per_row = layers
    measure, norms = Measure(length, cells_for(heads * layers, length), on_call), Norms(model)
    losses: dict[str, list[Tensor]] = {ALL: [], WINDOW: [], KEPT: []}
    functions: dict[str, Any] = {
        ALL: measure,
        WINDOW: Window(window, 0, on_call),
        KEPT: Window(window, keep, on_call),
    }
    in_pieces = runs_in_pieces(model, rows.ids[0].to(device))
    for ids, kinds in zip(rows.ids.to(device), rows.kinds, strict=True):
        measure.begin(kinds)
        with norms.of_one_text():
            losses[ALL].append(losses_through(measure, model, ids, in_pieces))
        if not measure.layers:
            raise BadInput(
                f"{type(model).__name__} ran without calling an attention of Transformers' interface: look has nothing to read"
            )
        per_row = len(measure.layers)
        for name in (WINDOW, KEPT):
            losses[name].append(losses_through(functions[name], model, ids, in_pieces))
    return Looked(
        measure.layers, norms.result(), measure.positions, measure.far,
        {name: torch.stack(found).cpu() for name, found in losses.items()}, rows, window, keep,
    )  # fmt: skip
