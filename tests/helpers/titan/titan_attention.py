"""Each model's own attention module, alone and in float64, with StableMask and with the oracle. A program of titan_driver.py."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
import torchtitan.models.deepseek_v3 as deepseek_v3
import torchtitan.models.gpt_oss as gpt_oss
import torchtitan.models.llama3 as llama3
import torchtitan.models.muse_glimmer as muse_glimmer
from titan_oracle import oracle_attention
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torchtitan.models.common.attention import create_varlen_metadata_for_document

from sm_flex_torchtitan.overrides import attention_backend, stablemask

BATCH, LENGTH, WINDOW = 2, 70, 16
STARTS = ((0, 23, 50), (0, 40, 69))  # of the documents of each row


def configs() -> dict[str, Any]:
    """An attention of each kind, as the models' debug configs have them; windows are made shorter than a document."""
    gpt = _layers(gpt_oss.model_registry("debugmodel"))
    muse = _layers(muse_glimmer.model_registry("debugmodel", attn_backend="flex"))
    return {
        "llama3": _layers(llama3.model_registry("debugmodel", attn_backend="flex"))[0].attention,
        "gpt_oss, window": replace(gpt[0].attention, sliding_window_size=WINDOW),
        "gpt_oss": gpt[1].attention,
        "deepseek_v3, kimi_k2_7": _layers(deepseek_v3.model_registry("debugmodel"))[0].attention,
        "muse_glimmer, window": replace(muse[0].attention, window_size=WINDOW),
        "muse_glimmer": muse[3].attention,
        "qwen3_5": _layers(qwen3_5())[3].attention,
    }


def _layers(spec: Any) -> list[Any]:
    return spec.model.layers


def qwen3_5() -> Any:
    """The model's config. The library of its linear attention wants a GPU, and its full attention needs none of that."""
    for name in ("fla", "fla.modules", "fla.modules.conv", "fla.modules.conv.triton", "fla.modules.conv.triton.ops",
                 "fla.ops", "fla.ops.gated_delta_rule", "fla.ops.gated_delta_rule.chunk",
                 "fla.ops.gated_delta_rule.fused_recurrent"):  # fmt: skip
        module = ModuleType(name)
        module.__getattr__ = lambda attribute: MagicMock(name=attribute)  # pyright: ignore[reportAttributeAccessIssue]
        sys.modules[name] = module
    import torchtitan.models.qwen3_5 as package

    return package.model_registry("debugmodel", attn_backend="flex")


def main() -> dict[str, Any]:
    cases: dict[str, tuple[Any, str, dict[str, Any]]] = {}
    for name, config in configs().items():
        for backend in ("flex", "varlen"):
            cases[f"{name}, {backend}"] = (config, backend, {"gamma": "headwise"})
    found = configs()
    cases["gpt_oss, its sinks alone"] = (found["gpt_oss, window"], "varlen", {"gamma": float("inf")})
    for name, backend in (("llama3", "flex"), ("gpt_oss", "varlen")):
        cases[f"{name}, learned"] = (found[name], backend, {"gamma": "headwise", "learned": True})
    found_errors = {name: errors(*case) for name, case in cases.items()}
    without = errors(found["gpt_oss"], "varlen", {"gamma": "headwise"}, gamma=float("inf"))
    return {"errors": {**found_errors, "gpt_oss, without gamma": without}}


def errors(config: Any, backend: str, kwargs: dict[str, Any], **changes: Any) -> dict[str, float]:
    """The largest error of the output and of each gradient, relative to the largest element of the oracle's.

    changes: of the kwargs, that the oracle is not told.
    """
    config = replace(config, rope=replace(config.rope, max_seq_len=LENGTH))
    config.inner_attention = attention_backend(config, name="flex").inner_attention
    expected = outcome(oracle_attention(config, length=LENGTH + 7, **kwargs), "flex")
    config = attention_backend(config, name=backend)
    actual = outcome(stablemask(config, length=LENGTH + 7, **{**kwargs, **changes}), backend)
    assert actual.keys() == expected.keys()
    assert all(x.abs().max() > 0 for x in expected.values())
    return {name: ((actual[name] - x).abs().max() / x.abs().max()).item() for name, x in expected.items()}


def outcome(config: Any, backend: str) -> dict[str, Tensor]:
    """The module's output, and the gradients of its input, of what its inner attention is given and of its parameters."""
    torch.manual_seed(0)
    module = config.build()
    module.init_states()
    module = module.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            parameter.mul_(0.5 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5)
    given: dict[str, Tensor] = {}

    def keep(_: Any, args: tuple[Tensor, ...]) -> None:
        for name, x in zip("qkv", args, strict=True):
            x.retain_grad()
            given[name] = x

    module.inner_attention.register_forward_pre_hook(keep)
    positions_BL = torch.stack([_positions(starts) for starts in STARTS])
    window = getattr(config, "sliding_window_size", None)
    mask = create_varlen_metadata_for_document(positions_BL) if backend == "varlen" else _block_mask(positions_BL, window)
    masks: Any = mask
    if backend == "flex" and hasattr(config, "scale_query_by"):  # muse_glimmer takes its mask from those of all windows
        masks = {"global" if window is None else f"swa_{window}": mask}
    dim = config.wo.out_features
    x_BLD = torch.randn(BATCH, LENGTH, dim, generator=generator, dtype=torch.float64).requires_grad_()
    out_BLD = module(x_BLD, masks, positions_BL)
    (out_BLD * torch.randn(out_BLD.shape, generator=generator, dtype=torch.float64)).sum().backward()
    tensors = {"x": x_BLD, **given, **dict(module.named_parameters())}
    result = {"out": out_BLD.detach()}
    for name, x in tensors.items():
        assert x.grad is not None, name
        result[f"d {name}"] = x.grad
    return result


def _positions(starts: tuple[int, ...]) -> Tensor:
    positions = torch.arange(LENGTH)
    for start in starts:
        positions[start:] = torch.arange(LENGTH - start)
    return positions


def _block_mask(positions_BL: Tensor, window: int | None) -> Any:
    document_BL = (positions_BL == 0).cumsum(1)
    seen: Callable[..., Tensor] = lambda b, h, i, j: (  # noqa: E731
        (j <= i) & (document_BL[b, i] == document_BL[b, j]) & (i - j < (LENGTH if window is None else window))
    )
    return create_block_mask(seen, BATCH, None, LENGTH, LENGTH, device="cpu")
