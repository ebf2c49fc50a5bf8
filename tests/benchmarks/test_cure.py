"""benchmarks.cure on a tiny Llama: rows, masks, sinks, variants, training, measures, roundings, and the command itself."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from benchmarks.cure import cli, figures, measures, quantise, sinks, stages, train
from benchmarks.cure.model import attentions, folder_of, mass_of, set_mass
from benchmarks.cure.variants import ALL, BY_NAME, FALL, apply, mass_at
from benchmarks.cure.views import WHOLE, View, mask_of
from sm_flex import headwise_gamma, log_mass
from sm_flex_transformers import stablemask_attention
from tests.helpers.cure import (
    CPU,
    DIM,
    HEADS,
    KEY_HEADS,
    LAYERS,
    SMALL,
    WORDS,
    corpus,
    random_sinks,
    run_of,
    tiny,
    write_model,
    write_text,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*fused.*:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def model(folder: Path) -> Any:
    return tiny(folder)


@pytest.fixture
def rows_RL() -> Tensor:
    return torch.randint(len(WORDS), (5, 33), generator=torch.Generator().manual_seed(3))


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
    at = [mass_at(BY_NAME["annealed"], found, done).sink_LH for done in (0.0, 0.25, 0.5, 1.0)]
    assert torch.equal(at[0] - at[1], torch.full_like(found.level_LH, FALL / 2))  # pyright: ignore[reportOptionalOperand]
    assert at[2] is None
    assert at[3] is None


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


@pytest.mark.parametrize("name", ["evicted-value", "annealed", "learned", "penalty-mass-value"])
def test_a_killed_run_goes_on_with_the_losses_it_would_have_had(name: str, folder: Path, tmp_path: Path) -> None:
    whole = run_of(name, folder, tmp_path / "whole")
    there = train.train(whole).state_dict()

    class KilledError(Exception):
        pass

    def kill(run: train.TrainingRun) -> None:
        if len(run.training) == 3:
            raise KilledError

    with pytest.raises(KilledError):
        train.train(run_of(name, folder, tmp_path / "killed"), kill)
    killed = run_of(name, folder, tmp_path / "killed")
    killed.load()
    assert len(killed.training) == 2
    assert not killed.done
    here = train.train(killed).state_dict()
    assert killed.done
    assert killed.training == whole.training
    assert killed.norms == whole.norms
    assert all(torch.equal(there[key], here[key]) for key in there)
    assert not torch.equal(there["model.layers.0.mlp.up_proj.weight"], tiny(folder).model.layers[0].mlp.up_proj.weight)
    assert torch.equal(there["model.embed_tokens.weight"], tiny(folder).model.embed_tokens.weight)


def test_a_finished_run_gives_back_the_model_and_the_mass_that_it_was_trained_to(
    folder: Path, tmp_path: Path, rows_RL: Tensor
) -> None:
    run = run_of("learned", folder, tmp_path / "run")
    trained = train.train(run)
    again = run_of("learned", folder, tmp_path / "run").trained_model()
    assert torch.equal(measures.losses(trained, rows_RL, WHOLE), measures.losses(again, rows_RL, WHOLE))
    gammas = torch.tensor([module.config.stablemask["gamma"] for module in attentions(again)])
    torch.testing.assert_close(gammas, again.log_gamma_LH.detach().exp())
    assert (gammas - headwise_gamma(HEADS)).abs().min() > 1e-6  # every one was trained


def test_a_checkpoint_of_another_configuration_is_refused(folder: Path, tmp_path: Path) -> None:
    train.train(run_of("causal", folder, tmp_path / "run"))
    with pytest.raises(ValueError, match="was trained with order = 0, and this run has 1"):
        run_of("causal", folder, tmp_path / "run", order=1).load()
    (tmp_path / "run" / train.WEIGHTS).write_text("no weights")
    with pytest.raises(ValueError, match="is no checkpoint of benchmarks"):
        run_of("causal", folder, tmp_path / "run").load()


def test_a_folder_that_another_process_holds_is_left_alone(folder: Path, tmp_path: Path) -> None:
    run, seen = run_of("causal", folder, tmp_path / "run"), []
    with train.held(tmp_path / "run") as mine:
        assert mine
        train.train_all([run], lambda run, model: seen.append(run))
        assert not run.training
    train.train_all([run], lambda run, model: seen.append(run))
    assert run.done
    assert seen == [run]


def test_the_penalty_counts_norms_above_four_medians() -> None:
    states = [torch.zeros(1, 5, 3) for _ in range(4)]
    for x in states:
        x[..., 0] = torch.tensor([80.0, 1.0, 1.0, 1.0, 1.0])  # the median is 1
    states[1][0, 0, 0] = 4.0  # the first of the two layers that count
    expected = (0.0 + math.log(80 / 4)) / 2
    assert train.excess(states).item() == pytest.approx(expected, rel=1e-6)


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
    assert result["norm_first"] == pytest.approx(norms[..., 0].max().item(), rel=1e-5)
    assert result["norm_other"][1] == pytest.approx(norms[..., 1:].max().item(), rel=1e-5)


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
def test_rounding_leaves_255_steps_and_at_most_half_a_step_of_error(by: str) -> None:
    x = torch.randn(4, 7, 5)
    x[0, 0, 0] = 50.0
    found = quantise.rounded(x, by)
    scale = (x.abs().amax(-1, keepdim=True) if by == "token" else x.abs().amax()) / 127
    steps = found / scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert steps.abs().max() <= 127 + 1e-4
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
            handle = linear.register_forward_hook(lambda module, given, out: seen.extend([given[0], module.weight.clone(), out]))
            found[name] = measures.losses(model, rows_RL[:1], WHOLE)
            handle.remove()
        given, weight, out = seen[-3:]
        if rounding.weights:
            torch.testing.assert_close(weight, quantise.rounded(before["model.layers.1.mlp.down_proj.weight"], "token"))
        if rounding.activations is not None:
            torch.testing.assert_close(given, quantise.rounded(given, rounding.activations))
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
    torch.testing.assert_close(linear(x), ours, rtol=1e-3, atol=1e-3)


def test_the_plan_trains_the_first_order_of_all_first_and_the_long_ones_last() -> None:
    runs = cli.plan(ALL, SMALL, 2, 9)
    assert [run[0] for run in runs[: len(ALL)]] == list(ALL)
    assert {order for _, order, _ in runs[: len(ALL)]} == {0}
    assert [variant.kind for variant, order, _ in runs if order == 1] == ["main"] * 11
    assert [(variant.name, steps) for variant, _, steps in runs[-4:]] == [(name, 9) for name in cli.LONG]


def test_the_command_writes_its_tables_and_figures_and_trains_nothing_twice(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        "--model",
        str(folder),
        "--text",
        str(write_text(tmp_path / "text")),
        "--variants",
        "causal,evicted-mass,headwise,alone-mass",
    ]
    options += ["--steps", "2", "--orders", "2", "--long", "3", "--rows", "3", "--long-rows", "2"]
    options += ["--run", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    cli.main(options, SMALL)
    record = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert list(record["variants"]) == [
        "causal",
        "evicted-mass",
        "headwise",
        "alone-mass",
        "causal-3",
        "evicted-mass-3",
        "headwise-3",
    ]
    assert record["variants"]["causal"]["orders"] == [0, 1]
    assert record["variants"]["alone-mass"]["orders"] == [0]
    assert len(record["variants"]["causal-3"]["training"][0]) == 3
    assert len(record["untrained"]) == 6
    assert record["stream"]["untrained-mass-value"]["nats"][0][0] > 0
    page = next((tmp_path / "out").glob("*.md")).read_text()
    for title in ("The illness", "The switch", "The cure", "Where attention went", "Longer", "Streaming", "Rounded to int8"):
        assert f"## {title}" in page
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    causal, mass = (record["variants"][name]["losses"] for name in ("causal", "evicted-mass"))
    value, error = measures.paired(mass["own"]["all"], causal["whole"]["all"])
    assert f"| {value:+.4f} ({error:.4f}) |" in page

    def trains(*args: Any) -> None:
        raise AssertionError("trained or measured again")

    monkeypatch.setattr(train, "one_step", trains)
    monkeypatch.setattr(measures, "losses", trains)
    cli.main(options, SMALL)
    again = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert {**again, "source": 0} == {**record, "source": 0}
    capsys.readouterr()
    figures.main([str(next((tmp_path / "out").glob("*.json")))])
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_rows_measured_before_are_not_mixed_with_others(tmp_path: Path, rows_RL: Tensor) -> None:
    ours, other = (stages.HeldOut(rows, rows_RL[:0], 8) for rows in (rows_RL, rows_RL[1:]))
    stages._kept(tmp_path / "x.json", ours, lambda: [1.0])
    assert stages._kept(tmp_path / "x.json", ours, lambda: [2.0]) == [1.0]
    assert stages.read(tmp_path / "x.json", other) is None
    assert stages._kept(tmp_path / "x.json", other, lambda: [2.0]) == [2.0]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--variants", "causal,cured"], "--variants: no such variant: cured"),
        (["--model", "nowhere"], "--model: no such file or folder: nowhere"),
        (["--model", "{text}"], "has no config.json: give a folder that save_pretrained wrote, or a .gguf file"),
        (["--model", "{text}/0.txt"], "is neither a folder of Transformers nor a .gguf file"),
        (["--text", "{text}/0.txt", "--model", "{model}"], "is too short: it takes documents of more than 32 tokens"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], why: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text")
    (text / "0.txt").write_text("word1 word2")
    options = [option.format(text=text, model=folder) for option in options]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--out", str(tmp_path / "out"), "--run", str(tmp_path / "runs"), *options], SMALL)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line


def test_a_folder_of_transformers_is_taken_as_it_is(folder: Path) -> None:
    assert folder_of(folder) == folder
    assert mass_of(attentions(tiny(folder))[0], CPU).length == 1
    assert DIM * HEADS == 24
