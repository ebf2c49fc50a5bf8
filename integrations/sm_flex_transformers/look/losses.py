"""The loss of each token of a row, without holding the logits of all.

Dimension letters: S tokens that are read.
"""

import inspect
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sm_flex_transformers.look import calls

ROWS = 256  # of logits at a time


@torch.no_grad()
def next_token_losses(model: Any, ids: Tensor, in_pieces: bool) -> Tensor:
    """(S,) float32 nats of the tokens ids[1:], for ids (S + 1,); the model's layers run once.

    in_pieces: its head runs on some rows at a time. It is asked for each with logits_to_keep, and its body gives back what it
    gave the first time: so whatever the model does to its logits (soft-capping, scaling) is in them.
    """
    inputs, targets = ids[:-1].unsqueeze(0), ids[1:]
    if not in_pieces:
        return _cross_entropy(model(input_ids=inputs, use_cache=False).logits[0], targets)
    given = _bodys_output(model, inputs)
    body = model.base_model
    own = vars(body).get("forward")
    body.forward = lambda *args, **kwargs: given[0]
    try:
        found = []
        for rows in torch.arange(len(targets), device=ids.device).split(ROWS):
            logits = model(input_ids=inputs, use_cache=False, logits_to_keep=rows).logits[0]
            found.append(_cross_entropy(logits, targets[rows]))
    finally:
        del body.forward
        if own is not None:
            body.forward = own
    return torch.cat(found)


def losses_through(around: Any, model: Any, ids: Tensor, in_pieces: bool) -> Tensor:
    """next_token_losses() with around in the place of each layer's attention (calls.around_attention), or, None, as it is."""
    with nullcontext() if around is None else calls.around_attention(around):
        return next_token_losses(model, ids, in_pieces)


@torch.no_grad()
def runs_in_pieces(model: Any, ids: Tensor) -> bool:
    """Whether the model's forward is its body, once, and a head for the rows of logits_to_keep."""
    if model.base_model is model or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return False
    return len(_bodys_output(model, ids[:2].unsqueeze(0))) == 1


def _bodys_output(model: Any, inputs: Tensor) -> list[Any]:
    given: list[Any] = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: given.append(output))
    try:
        model(input_ids=inputs, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return given


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    pieces = zip(logits.split(ROWS), targets.split(ROWS), strict=True)
    return torch.cat([F.cross_entropy(x.float(), y, reduction="none") for x, y in pieces])
