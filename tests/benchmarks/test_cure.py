"""benchmarks.cure on a tiny Llama: rows, views, sinks, and masses through the config."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from benchmarks.cure import sinks
from benchmarks.cure.model import attentions, folder_of, mass_of
from benchmarks.cure.variants import BY_NAME, FALL, apply, mass_at
from benchmarks.cure.views import WHOLE, View, mask_of
from sm_flex import headwise_gamma, log_mass
from sm_flex_transformers import stablemask_attention
from tests.helpers.cure import CPU, DIM, HEADS, KEY_HEADS, LAYERS, SMALL, corpus, random_sinks, tiny


def eager_logits(model: Any, ids: Tensor, seen: Tensor, masses: list[Any]) -> Tensor:
    """Eq. 11 in float64 with each layer's log mass (H, S) per pseudo score, and its value or None: a plain attention function."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any) -> Any:
        groups = module.num_key_value_groups
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = (query @ key.mT * given["scaling"]).double().masked_fill(~seen, -math.inf)
        extra = masses[module.layer_idx]
        columns = [log_mass_HS[None, ..., None].expand(len(scores), -1, -1, -1) for log_mass_HS, _ in extra]
        weights = torch.cat([scores, *columns], -1).softmax(-1)
        out = weights[..., : scores.shape[-1]] @ value.double()
        for i, (_, value_HD) in enumerate(extra):
            if value_HD is not None:
                out = out + weights[..., scores.shape[-1] + i, None] * value_HD[None, :, None]
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register("eager-oracle", attention)
    model.set_attn_implementation("eager-oracle")
    for module in attentions(model):
        module.config = model.config
    with torch.no_grad():
        logits = model(ids, attention_mask=seen[None, None], use_cache=False).logits
    model.set_attn_implementation("stablemask")
    return logits


def masses_of(name: str, found: sinks.Sinks, done: float, length: int) -> list[Any]:
    """What a variant's mass is said to be, by layer: [(log mass (H, S), value (H, D) or None)]."""
    positions, groups = torch.arange(length), HEADS // KEY_HEADS
    level_LHS = found.level_LH.double()[..., None].expand(-1, -1, length)
    headwise_HS = log_mass(headwise_gamma(HEADS).double(), positions, SMALL.length)
    per_layer = []
    for layer in range(LAYERS):
        value_HD = found.value_LKD[layer].double().repeat_interleave(groups, 0)
        level_HS = level_LHS[layer]
        per_layer.append({
            "causal": [], "evicted": [], "headwise": [(headwise_HS, None)], "evicted-headwise": [(headwise_HS, None)],
            "mass": [(level_HS, None)], "evicted-mass": [(level_HS, None)], "alone-mass": [(level_HS, None)],
            "evicted-value": [(level_HS, value_HD)],
            "shares": [(log_mass(found.gamma_LH[layer].double(), positions, SMALL.length), None)],
            "annealed": [(headwise_HS, None), (level_HS - FALL * 2 * done, None)],
        }[name])  # fmt: skip
    return per_layer


def test_rows_are_of_single_documents_the_same_for_all_and_in_another_order_for_each_order() -> None:
    text = corpus()
    first, again, other = (text.training_rows(32, order) for order in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.sort(0).values, other.sort(0).values)
    assert first.shape == (18, 33)  # three to a document of 100
    assert torch.equal(first - first[:, :1], torch.arange(33).expand_as(first))
    held_out = text.held_out_rows(32, 4)
    assert torch.equal(held_out[:, 0], torch.tensor([600, 664, 764, 864]))


@pytest.mark.parametrize(
    ("view", "sees"),
    [
        (View(window=4), lambda i, j: i - j < 4),
        (View(window=4, keep=2), lambda i, j: i - j < 4 or j < 2),
        (View(evict=3), lambda i, j: j > 0 or i < 3),
        (View(evict=1), lambda i, j: j > 0 or i == 0),
    ],
)
def test_a_view_is_the_mask_that_its_words_say(view: View, sees: Any) -> None:
    mask = mask_of(view, 9, CPU)
    assert mask is not None
    expected = [[j <= i and sees(i, j) for j in range(9)] for i in range(9)]
    assert mask[0, 0].tolist() == expected
    assert mask_of(WHOLE, 9, CPU) is None


@pytest.mark.parametrize("view", [View(), View(evict=8), View(evict=1), View(window=8), View(window=8, keep=4)])
@pytest.mark.parametrize("name", ["causal", "headwise", "mass", "evicted-value", "shares", "annealed"])
def test_what_the_config_says_is_equation_11_with_the_variants_mass(model: Any, name: str, view: View, rows_RL: Tensor) -> None:
    found, ids = random_sinks(), rows_RL[:2, :-1]
    apply(model, BY_NAME[name], found, SMALL.length, 1, 5)
    with torch.no_grad():
        ours = model(ids, attention_mask=mask_of(view, 32, CPU), use_cache=False).logits
    mask = mask_of(view, 32, CPU)
    seen = torch.ones(32, 32, dtype=torch.bool).tril() if mask is None else mask[0, 0]
    theirs = eager_logits(model, ids, seen, masses_of(name, found, 1 / 5, 32))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if name != "causal":
        plain = eager_logits(model, ids, seen, masses_of("causal", found, 0.0, 32))
        assert (theirs - plain).abs().max() > 1e-2


def test_an_annealed_mass_falls_and_is_gone_after_half_of_the_steps() -> None:
    found = random_sinks()
    at: list[Any] = [mass_at(BY_NAME["annealed"], found, done).sink_LH for done in (0.0, 0.25, 0.5, 1.0)]
    assert torch.equal(at[0] - at[1], torch.full_like(found.level_LH, FALL / 2))
    assert at[2] is None
    assert at[3] is None


def test_by_schedule_the_mean_share_of_the_mass_grows_evenly_over_half_of_the_steps(model: Any) -> None:
    """Where all real scores are 0 it is M / (M + p + 1), in the mean over the rows."""
    positions, shares = torch.arange(32), []
    for step in range(9):
        apply(model, BY_NAME["schedule"], random_sinks(), 32, step, 8)
        setting: Any = attentions(model)[1].config.stablemask
        gamma = headwise_gamma(HEADS) if setting["gamma"] == "headwise" else torch.tensor(setting["gamma"])
        mass_HS = log_mass(gamma.double(), positions, 32).exp()
        shares.append((mass_HS / (mass_HS + positions + 1)).mean(1))
    torch.testing.assert_close(torch.stack(shares[:5]), shares[4] * torch.arange(5)[:, None] / 4, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(share, shares[4]) for share in shares[5:])
    assert shares[4].min() > 0.01


def test_the_level_of_a_sink_is_the_mass_with_its_mean_share_and_so_is_the_gamma(model: Any, rows_RL: Tensor) -> None:
    """By brute force: the first token is hidden, the mass is there, and the mean share of the mass is what the token had."""
    ids = rows_RL[:, :-1]
    found = sinks.measure(model, ids)
    seen = torch.ones(32, 32, dtype=torch.bool).tril()
    scores, values = {}, {}

    def look(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
        groups = module.num_key_value_groups
        scores[module.layer_idx] = (query.double() @ key.double().repeat_interleave(groups, 1).mT) * given["scaling"]
        values[module.layer_idx] = value
        return stablemask_attention(module, query, key, value, mask, **given)

    AttentionInterface.register("stablemask", look)
    with torch.no_grad():
        model(ids, use_cache=False)
    AttentionInterface.register("stablemask", stablemask_attention)
    for layer in range(LAYERS):
        hidden = scores[layer].masked_fill(~seen, -math.inf)
        share = hidden.softmax(-1)[:, :, 8:, 0].mean((0, 2))
        torch.testing.assert_close(found.share_LH[layer].double(), share, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.value_LKD[layer], values[layer][:, :, 0].mean(0))
        others = hidden[..., 1:].logsumexp(-1)[:, :, 8:]
        level = found.level_LH[layer].double()[None, :, None].expand_as(others)
        gamma = log_mass(found.gamma_LH[layer].double(), torch.arange(8, 32), 32).expand_as(others)
        masses = {"level": level, "gamma": gamma}
        for mass in masses.values():
            reached = (mass.exp() / (mass.exp() + others.exp())).mean((0, 2))
            reachable = (found.gamma_LH[layer] > 1e-6) | torch.tensor(mass is level)
            assert reachable.any()
            torch.testing.assert_close(reached[reachable], share[reachable], rtol=1e-3, atol=1e-5)


def test_a_folder_of_transformers_is_taken_as_it_is(tiny_llama: Path) -> None:
    assert folder_of(tiny_llama) == tiny_llama
    assert mass_of(attentions(tiny(tiny_llama))[0], CPU).length == 1
    assert DIM * HEADS == 24
