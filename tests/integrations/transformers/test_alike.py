"""What is read once a forward, for the layers that are handed the same (sm_flex_transformers/alike.py)."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from sm_flex_transformers import attention, forwards
from tests.helpers.transformers_models import COMMON, CONFIGS, LENGTH, agree, cache_name, model_of, tokens


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The layers that were read, not recalled."""
    found: list[int | None] = []
    plain = attention._check

    def check(module: Any, *args: Any) -> None:
        found.append(module.layer_idx)
        plain(module, *args)

    monkeypatch.setattr(attention, "_check", check)
    return found


def logits(model: PreTrainedModel, ids: Tensor, **given: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **given).logits  # pyright: ignore[reportCallIssue]


def test_one_layer_of_a_forward_is_read(read: list[int | None]) -> None:
    model, ids = model_of(CONFIGS["llama"]()), tokens(2, 9)
    expected = logits(model_of(CONFIGS["llama"](), "oracle"), ids)
    agree(logits(model, ids), expected)
    assert read == [0]
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        steps = [model(token, **{cache_name(model): cache}).logits for token in ids.split(1, dim=1)]
    agree(torch.cat(steps, 1), expected)
    assert read == [0] * 10
    out: Any = model(ids, use_cache=False)
    out.logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert read == [0] * 11


def test_layers_that_differ_are_read_each(read: list[int | None]) -> None:
    ids = tokens(1, 9)
    logits(model_of(CONFIGS["gemma3"]()), ids)  # one with a window, one without
    assert read == [0, 1]
    read.clear()
    padded = torch.ones(2, 9, dtype=torch.long)
    padded[0, :3] = 0
    logits(model_of(CONFIGS["llama"]()), tokens(2, 9), attention_mask=padded)
    assert read == [0, 1]
    read.clear()
    config = CONFIGS["llama"]()
    config.stablemask = {"gamma": "headwise", "length": LENGTH, "sink": [[0.5] * 6, [-1.0] * 6]}
    logits(model_of(config), ids)
    assert read == [0, 1]


def test_a_setting_or_positions_that_change_between_forwards_are_noticed(read: list[int | None]) -> None:
    model, ids, positions = model_of(CONFIGS["llama"]()), tokens(1, 9), torch.arange(9)[None]
    first = logits(model, ids, position_ids=positions)
    model.config.stablemask = {"gamma": "headwise", "length": LENGTH + 40}
    longer = logits(model, ids, position_ids=positions)
    assert (longer - first).abs().max() > 1e-4
    config = CONFIGS["llama"]()
    config.stablemask = {"gamma": "headwise", "length": LENGTH + 40}
    other = model_of(config, "oracle")
    other.load_state_dict(model.state_dict())
    agree(longer, logits(other, ids, position_ids=positions))
    positions.add_(5)
    agree(logits(model, ids, position_ids=positions), logits(other, ids, position_ids=positions))
    assert read == [0] * 3


def test_positions_written_to_within_a_forward_are_noticed(read: list[int | None]) -> None:
    model, ids, positions = model_of(CONFIGS["llama"]()), tokens(1, 9), torch.arange(9)[None]

    def move(*_: Any) -> None:
        positions.add_(1)

    model.model.layers[0].register_forward_hook(move)  # pyright: ignore
    logits(model, ids, position_ids=positions)
    assert read == [0, 1]


def test_nothing_is_kept_beyond_a_forward(read: list[int | None]) -> None:
    model, ids = model_of(CONFIGS["llama"]()), tokens(1, 9)
    logits(model, ids)
    assert forwards.read_by_a_layer() is None
    layer = copy.deepcopy(model.model.layers[1].self_attn)  # pyright: ignore
    hidden, positions = torch.randn(1, 9, COMMON["hidden_size"], dtype=torch.float64), torch.arange(9)[None]
    angles = model.model.rotary_emb(hidden, positions)  # pyright: ignore
    for _ in range(2):  # called by itself, no hook says when it ends
        layer(hidden, position_embeddings=angles, attention_mask=None, position_ids=positions)
    assert read == [0, 1, 1]


def test_a_checkpointed_layer_is_read_when_it_runs_again(read: list[int | None]) -> None:
    """In the backward, where no forward runs: what it then saves must be what it saved."""
    model, ids = model_of(CONFIGS["llama"]()).train(), tokens(2, 9)
    grads = []
    for again in (False, True):
        if again:
            enable = (
                getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            )  # 5.24 and before
            enable({"use_reentrant": False})
        model(ids, labels=ids, use_cache=False).loss.backward()  # pyright: ignore
        grads.append([p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    assert read == [0, 0, 1, 0]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)
