"""Caches that are quantised, or that live off the GPU: eq. 11 over what the cache gives back."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.transformers_models import CONFIGS, agree, model_of, ragged

NEW = 12
PACKAGES = {"quanto": "optimum.quanto", "hqq": "hqq"}


def logits(attention: str, inputs: dict[str, Tensor], device: str = "cpu", **options: Any) -> Tensor:
    """Of NEW steps of a float32 model, in which all take the same tokens."""
    model: Any = model_of(CONFIGS["llama-gqa"](), attention).float()
    model.to(torch.device(device))
    out = model.generate(
        **{name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}, max_new_tokens=NEW, do_sample=False,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return torch.stack(out.logits)


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of its parent
        return False


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the packages' own
@pytest.mark.parametrize(("backend", "bits"), [("quanto", 4), ("hqq", 8)])
def test_a_quantised_cache_is_equation_11_over_what_it_holds(backend: str, bits: int) -> None:
    if not installed(PACKAGES[backend]):
        pytest.skip(f"needs {PACKAGES[backend]}")
    _, inputs = ragged([20, 9], "left")
    cache = {"backend": backend, "nbits": bits, "residual_length": 8, "q_group_size": 8}
    options: dict[str, Any] = {"cache_implementation": "quantized", "cache_config": cache}
    ours = logits("stablemask", inputs, **options)
    agree(ours, logits("oracle", inputs, **options), 1e-4)
    assert (ours - logits("stablemask", inputs)).abs().max() > 1e-2  # it is quantised
    assert (ours[0] - logits("sdpa", inputs, **options)[0]).abs().max() > 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_is_the_one_on_the_gpu(cache: str) -> None:
    _, inputs = ragged([20, 9], "left")
    agree(logits("stablemask", inputs, "cuda", cache_implementation=cache), logits("stablemask", inputs, "cuda"), 1e-4)
