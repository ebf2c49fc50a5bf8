"""Calls without values: the meta device, fake tensors, and torch.export with a dynamic length."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForCausalLM

from tests.helpers.transformers_models import CONFIGS, VOCABULARY, agree, model_of, tokens


def config() -> Any:
    made = CONFIGS["llama"]()
    made._attn_implementation = "stablemask"
    return made


def test_a_forward_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(config())
        out = model(torch.zeros(2, 9, dtype=torch.long)).logits
    assert out.shape == (2, 9, VOCABULARY)
    assert out.device.type == "meta"


@pytest.mark.parametrize("cache", [False, True])
def test_a_forward_under_fake_tensors_leaves_nothing_behind(cache: bool) -> None:
    model, ids = LlamaForCausalLM(config()), tokens(1, 9)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.zeros(1, 9, dtype=torch.long), use_cache=cache).logits.shape == (1, 9, VOCABULARY)
    with torch.no_grad():  # a fake gamma that was kept would be found here
        assert type(model(ids, use_cache=cache).logits) is torch.Tensor


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_export_with_a_dynamic_length_from_2(batch: int) -> None:
    """No comparison of a length with the batch size gets into the graph, and what comes out is right on both sides of it."""
    model = model_of(CONFIGS["llama"]())
    ids = tokens(batch, 9)
    exported = torch.export.export(
        model, (), {"input_ids": ids, "use_cache": False}, strict=False,
        dynamic_shapes={"input_ids": {1: torch.export.Dim("S", min=2, max=64)}, "use_cache": None},
    )  # fmt: skip
    with torch.no_grad():
        for length in (2, 3, 9, 30):
            ids = tokens(batch, length)
            agree(exported.module()(input_ids=ids, use_cache=False).logits, model(ids, use_cache=False).logits)
