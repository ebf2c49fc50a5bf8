"""What benchmarks.cure measures, on a tiny Llama: losses, where attention goes, roundings to int8."""

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from benchmarks.cure import measures, quantise
from benchmarks.cure.model import set_mass
from benchmarks.cure.variants import BY_NAME, apply, mass_at
from benchmarks.cure.views import WHOLE, View, mask_of
from sm_flex_transformers import stablemask_attention
from tests.helpers.cure import CPU, LAYERS, random_sinks


def test_losses_are_cross_entropy_of_the_models_own_logits(model: Any, rows_RL: Tensor) -> None:
    set_mass(model, mass_at(BY_NAME["mass"], random_sinks(), 1.0), 32)
    found = measures.losses(model, rows_RL, View(window=8, keep=4))
    with torch.no_grad():
        logits = model(rows_RL[:, :-1], attention_mask=mask_of(View(window=8, keep=4), 32, CPU), use_cache=False).logits
    expected = -logits.log_softmax(-1).gather(-1, rows_RL[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    means = measures.by_row(found)
    assert means["late"] == pytest.approx(found[:, 16:].mean(1).tolist())
    blocks = measures.stream(model, rows_RL, {"window": View(window=8, keep=4)}, 8)["window"]
    assert torch.tensor(blocks).shape == (5, 4)
    torch.testing.assert_close(torch.tensor(blocks).mean(1), found.mean(1))


def test_where_attention_goes_is_the_matrix_of_equation_11(model: Any, rows_RL: Tensor) -> None:
    found, view = random_sinks(), View(evict=8)
    apply(model, BY_NAME["evicted-mass"], found, 32, 5, 5)
    states: list[Any] = []
    weights: dict[int, list[Tensor]] = {0: [], 1: []}

    def look(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **given: Any) -> Any:
        scores = (query @ key.repeat_interleave(module.num_key_value_groups, 1).mT * given["scaling"]).masked_fill(
            ~mask, -math.inf
        )
        level = found.level_LH[module.layer_idx][None, :, None, None].expand(1, -1, 32, 1)
        weights[module.layer_idx].append(torch.cat([scores, level], -1).softmax(-1)[0])
        return stablemask_attention(module, query, key, value, mask, **given)

    AttentionInterface.register("stablemask", look)
    with torch.no_grad():
        for row in rows_RL[: measures.LOOKED_AT]:
            mask = mask_of(view, 32, CPU)
            states.append(
                model.model(row[None, :-1], attention_mask=mask, use_cache=False, output_hidden_states=True).hidden_states
            )
    AttentionInterface.register("stablemask", stablemask_attention)
    looked = measures.Looked(LAYERS)
    measures.losses(model, rows_RL, view, looked)
    result = looked.result()
    mean = torch.stack([torch.stack(x).mean(0) for x in weights.values()])  # (L, H, S, S + 1)
    assert result["share_by_layer"] == pytest.approx([0.0, 0.0])  # from row 8 on nobody sees it
    assert result["pseudo_by_layer"] == pytest.approx(mean[:, :, 8:, -1].mean((1, 2)).tolist(), rel=1e-4)
    columns = mean[LAYERS * 2 // 5 :, :, 16:, :-1].mean((0, 1, 2))
    assert result["columns"] == pytest.approx(columns.tolist(), rel=1e-4)
    assert result["largest_column"] == pytest.approx([1 + int(columns[1:8].argmax()), columns[1:8].max().item()], rel=1e-4)
    norms = torch.stack([torch.stack([x[0].norm(dim=-1) for x in row[1:-1]]) for row in states])
    assert result["norm_first"] == pytest.approx(norms[..., 0].amax(1).median().item(), rel=1e-5)
    assert result["norm_other"][1] == pytest.approx(norms[..., 1:].amax((1, 2)).median().item(), rel=1e-5)
    assert result["norm_other_by_row"] == pytest.approx(norms[..., 1:].amax((1, 2)).tolist(), rel=1e-5)


def test_measuring_looks_at_the_own_view_and_at_all_keys(model: Any, rows_RL: Tensor) -> None:
    found = measures.measure(model, rows_RL, View(evict=8), 8)
    assert set(found["losses"]) == {"own", "whole", "window", "window+4", "evicted"}
    assert found["losses"]["own"] == found["losses"]["evicted"]
    assert found["own"]["share"] == 0.0
    assert found["whole"]["share"] > 0.01
    assert found["losses"]["window"]["all"] == pytest.approx(measures.losses(model, rows_RL, View(8)).mean(1).tolist())


def test_a_paired_difference_is_over_the_means_of_the_same_rows() -> None:
    ours, theirs = [[1.0, 2.0, 4.0], [3.0, 2.0, 2.0]], [[0.0, 2.0, 1.0], [1.0, 1.0, 2.0]]
    each = [(1.0 + 2.0) / 2, (0.0 + 1.0) / 2, (3.0 + 0.0) / 2]
    mean, error = measures.paired(ours, theirs)
    assert mean == pytest.approx(statistics.fmean(each))
    assert error == pytest.approx(statistics.stdev(each) / math.sqrt(3))


@pytest.mark.parametrize("by", ["token", "tensor"])
def test_rounding_leaves_256_steps_and_at_most_half_a_step_of_error(by: str) -> None:
    x = torch.randn(4, 7, 5)
    x[0, 0, 0] = 50.0
    found = quantise.rounded(x, by)
    scale = (x.abs().amax(-1, keepdim=True) if by == "token" else x.abs().amax()) / 127.5
    steps = found / scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert steps.min() >= -128 - 1e-4
    assert steps.max() <= 127 + 1e-4
    assert ((found - x).abs() <= scale / 2 + 1e-6).all()
    assert (quantise.rounded(torch.zeros(2, 3), by) == 0).all()


def test_a_rounded_model_multiplies_rounded_numbers_and_is_whole_again_afterwards(model: Any, rows_RL: Tensor) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = measures.losses(model, rows_RL, WHOLE)
    linear = model.model.layers[1].mlp.down_proj
    seen: list[Tensor] = []
    found = {}
    for name, rounding in quantise.ROUNDINGS.items():
        with quantise.quantised(model, rounding):
            before_it = linear.register_forward_pre_hook(lambda module, given: seen.append(given[0]), prepend=True)
            handle = linear.register_forward_hook(lambda module, given, out: seen.extend([given[0], module.weight.clone(), out]))
            found[name] = measures.losses(model, rows_RL[:1], WHOLE)
            handle.remove()
            before_it.remove()
        raw, given, weight, out = seen[-4:]
        if rounding.weights:
            torch.testing.assert_close(weight, quantise.rounded(before["model.layers.1.mlp.down_proj.weight"], "token"))
        by = rounding.activations
        torch.testing.assert_close(given, raw if by is None else quantise.rounded(raw, by))
        torch.testing.assert_close(out, given @ weight.mT)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(plain, measures.losses(model, rows_RL, WHOLE))
    assert all(1e-6 < (x - plain[:1]).abs().max() < 1.0 for x in found.values())
    assert len({x.sum().item() for x in found.values()}) == len(found)


def test_rounding_by_token_is_torchaos_own() -> None:
    quantization: Any = pytest.importorskip("torchao.quantization")
    linear = torch.nn.Linear(64, 32, bias=False)
    x = torch.randn(9, 64)
    ours = quantise.rounded(x, "token") @ quantise.rounded(linear.weight.data, "token").mT
    quantization.quantize_(linear, quantization.Int8DynamicActivationInt8WeightConfig())
    torch.testing.assert_close(linear(x), ours, rtol=1e-5, atol=1e-5)
