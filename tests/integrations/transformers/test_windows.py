"""Sliding windows and packed rows without a mask: the rows that they had with one, and no tensor of S x T elements."""

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralForCausalLM, OlmoeConfig
from transformers.cache_utils import DynamicCache

from sm_flex_transformers import interface
from tests.helpers.census.cases import Case
from tests.helpers.transformers_models import COMMON, CONFIGS, WINDOW, agree, cache_name, model_of, ragged, tokens

NAMES = pytest.mark.parametrize("attention", ["sm_flex", "stablemask"])


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation returns, as it is laid out in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


def largest(model_type: str, attention: str, length: int, packed: bool) -> int:
    """Of a forward and backward."""
    model, ids = Case(model_type).model(attention), tokens(1, length)
    given = {"position_ids": torch.arange(length)[None] % 300} if packed else {"use_cache": False}
    with Largest() as seen:
        model(ids, **given).logits.sum().backward()
    return seen.elements


@NAMES
@pytest.mark.parametrize("packed", [False, True])
def test_no_tensor_has_a_row_of_keys_for_each_query(attention: str, packed: bool) -> None:
    """Full and sliding layers of gpt-oss. Its own attention holds one for each head."""
    length = 640
    assert largest("gpt_oss", attention, length, packed) < length * length / 4
    if attention == "sm_flex" and not packed:
        assert largest("gpt_oss", "eager", length, packed) >= 4 * length * length


def test_the_mask_is_none_where_the_layers_know_it() -> None:
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    config = CONFIGS["mistral"]()
    config._attn_implementation = "stablemask"
    x, all_real, padded = torch.zeros(1, 19, 48), torch.ones(1, 19, dtype=torch.long), torch.ones(1, 19, dtype=torch.long)
    padded[0, 0] = 0
    packed = torch.arange(19)[None] % 5
    for make in (create_causal_mask, create_sliding_window_causal_mask):
        assert make(config, x, None, None) is None
        assert make(config, x, all_real, None) is None
        for mask in (make(config, x, padded, None), make(config, x, None, None, position_ids=packed)):
            assert mask is not None
            assert mask.shape == (1, 1, 19, 19)


def test_a_model_of_ones_own_that_does_not_say_how_wide_its_window_is_gets_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.masking_utils import create_sliding_window_causal_mask

    class Own(MistralForCausalLM):
        """In the place of one that looks its attention up, and leaves the window to the mask."""

    config = CONFIGS["mistral"]()
    config._attn_implementation = "sm_flex"
    monkeypatch.setattr(interface, "_OTHERS", set())
    monkeypatch.setattr(interface, "_source", lambda model: interface.LOOK_UP)
    Own(config)
    mask = create_sliding_window_causal_mask(config, torch.zeros(1, 19, 48), None, None)
    assert mask is not None
    assert mask.sum(-1).max() == WINDOW


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@NAMES
def test_a_cache_that_keeps_more_than_the_window(name: str, attention: str) -> None:
    """A cache that was not told of the model's windows keeps every key: a step takes the last ones."""
    config = CONFIGS[name]()
    config.stablemask = config.stablemask if attention == "stablemask" else None
    model, ids, cache = model_of(config, attention), tokens(2, 25), DynamicCache()
    with torch.no_grad():
        parts = [model(part, **{cache_name(model): cache}).logits for part in ids.split([6, 1, 1, 9, 1, 1, 6], dim=1)]
        agree(torch.cat(parts, 1), model(ids, use_cache=False).logits)
        agree(torch.cat(parts, 1), model_of(config, {"stablemask": "oracle", "sm_flex": "sdpa"}[attention])(ids).logits)


def test_a_window_that_the_model_puts_into_no_mask_is_left_out() -> None:
    """OLMoE hands its attention config.sliding_window, and its own attention sees every key all the same."""
    config = OlmoeConfig(**COMMON, num_key_value_heads=3, num_experts=2, num_experts_per_tok=1)
    config.stablemask, config.sliding_window = None, WINDOW
    ids, logits = tokens(2, 25), []
    for attention in ("sm_flex", "sdpa"):
        with torch.no_grad():
            logits.append(model_of(copy.deepcopy(config), attention)(ids).logits)
    agree(*logits)


@pytest.mark.parametrize("cache", [False, True])
@NAMES
def test_one_row_of_positions_packs_every_sequence_of_a_batch(attention: str, cache: bool) -> None:
    config = CONFIGS["mistral"]()
    config.stablemask = config.stablemask if attention == "stablemask" else None
    model, lengths, ids = model_of(config, attention), [5, 11, 3], tokens(2, 19)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, dim=1)], 1)
        agree(model(ids, position_ids=positions, use_cache=cache).logits, alone)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_dropout_is_applied_within_the_window(name: str) -> None:
    """The engines for packed rows have none: the call falls back on a mask, and the seed alone decides."""
    config = CONFIGS[name]()
    config.attention_dropout = 0.5
    model, ids = model_of(config).train(), tokens(1, 25)
    torch.manual_seed(5)
    first = model(ids, use_cache=False).logits
    torch.manual_seed(5)
    assert torch.equal(model(ids, use_cache=False).logits, first)
    assert (first - model.eval()(ids, use_cache=False).logits).abs().max() > 1e-3
    model.train()
    changed = ids.clone()
    changed[0, 0] += 1
    torch.manual_seed(5)
    moved = (model(changed, use_cache=False).logits - first).abs().amax(-1)[0] > 1e-9
    reach = 2 * (WINDOW - 1) if name == "mistral" else 24  # two sliding layers, or a full one
    assert not moved[reach + 1 :].any()
    assert moved[: WINDOW - 1].all()


def test_right_padding_keeps_its_mask() -> None:
    inputs = ragged([17, 5, 11], "right")[1]
    model = model_of(CONFIGS["mistral"]())
    seen = []
    hook = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model(**inputs)
    model(inputs["input_ids"])
    hook.remove()
    assert seen[0] is not None
    assert seen[1] is None
