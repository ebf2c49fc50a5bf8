"""The model of benchmarks.lm, and what is measured of it, each against it by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.lm import measures
from benchmarks.lm.model import Attention, Decoder, Plan, rope_table, rotate
from benchmarks.lm.text import pack, rows_of
from benchmarks.lm.train import train
from benchmarks.lm.variants import ALL, Mass, named
from sm_flex import headwise_gamma
from tests.helpers.lm import CPU, SMALL, corpus_of, run_of

EVERY = [v.name for v in ALL]
LENGTH, HEADS = SMALL.length, SMALL.heads


def random_model(name: str, position: str, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(SMALL, named(name), position)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.mark.parametrize("position", ["rope", "alibi", "absolute"])
@pytest.mark.parametrize("name", EVERY)
def test_a_changed_document_leaves_the_others_alone(name: str, position: str) -> None:
    model, lead = random_model(name, position), SMALL.vocab + 1 if named(name).token else None
    shift = 0 if lead is None else 1

    def logits(change: int | None) -> Tensor:
        # Rows of 13 tokens: a document of 5, one of 7 that goes on for 3 in the next row, and one of 10.
        line = torch.arange(40) % 7
        line[[0, 5, 16, 26]] = SMALL.vocab
        if change is not None:
            line[change] += 50
        batch = pack(rows_of(line[:27], 13), CPU, SMALL.vocab, lead)
        with torch.no_grad():
            return model(batch).unflatten(0, (2, -1))[:, shift:].flatten(0, 1)

    before = logits(None)
    for change, seen in ((4, [4]), (2, [2, 3, 4]), (14, [14, 15]), (11, [11, 12]), (20, list(range(20, 26)))):
        assert (logits(change) != before).any(dim=1).nonzero().flatten().tolist() == seen


@pytest.mark.parametrize("name", EVERY)
def test_the_same_text_gives_the_same_scores_wherever_it_lies(name: str) -> None:
    if named(name).token:
        pytest.skip("its token is before rows, not before documents")
    line = torch.tensor([300, 1, 2, 3, 4, 5, 300, 7, 300, 1, 2, 3, 4, 5])
    for position in ("rope", "alibi"):
        with torch.no_grad():
            scores = random_model(name, position)(pack(rows_of(line, 13), CPU, 300))
        torch.testing.assert_close(scores[8:13], scores[:5], rtol=1e-4, atol=1e-4)


def by_hand(layer: Attention, x: Tensor, position: str, window: int, kept: int) -> Tensor:
    """Query by query, against a cache of kept and recent tokens, positions counted in the cache."""
    q, k, v = layer.qkv(x).unflatten(1, (3, HEADS, -1)).unbind(1)
    rows = []
    for i in range(len(x)):
        keys = list(range(i + 1))
        if len(keys) > window:
            keys = keys[:kept] + keys[len(keys) - (window - kept) :]
        places = torch.arange(len(keys))
        if position == "rope":
            table = rope_table(places, q.shape[-1])
            query = rotate(q[i : i + 1], (table[0][-1:], table[1][-1:]))
            scores = torch.einsum("qhd,khd->hk", query, rotate(k[keys], table))
        else:
            scores = torch.einsum("hd,khd->hk", q[i], k[keys])
        scores = scores / q.shape[-1] ** 0.5
        if position == "alibi":
            scores = scores - headwise_gamma(HEADS)[:, None] * (len(keys) - 1 - places)
        log_m = layer.mass(torch.tensor([i])).mass(CPU, 1, 1, torch.float32).table(1, torch.float32)
        weights = torch.softmax(torch.cat([scores, log_m.expand(HEADS, 1)], dim=1), dim=1)
        out = torch.einsum("hk,khd->hd", weights[:, :-1], v[keys])
        if layer.mass.sink_values is not None:  # with gamma = inf all of log M is the sink's
            out = out + weights[:, -1:] * layer.mass.sink_values
        rows.append(out.flatten())
    return layer.out(torch.stack(rows))


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize(("window", "kept"), [(5, 0), (8, 4), (5, 1), (40, 0)])
@pytest.mark.parametrize("name", ["causal", "stablemask", "pseudo-0.01", "sink-learned", "sink-value"])
def test_window_attention_is_a_cache_of_recent_and_kept_tokens(name: str, window: int, kept: int, position: str) -> None:
    layer = random_model(name, position).attentions[0]
    torch.manual_seed(3)
    x = torch.randn(2 * LENGTH, SMALL.width)
    rows = torch.arange(2 * LENGTH + 1)[None]
    with torch.no_grad():
        plan = Plan(pack(rows, CPU, -1), position, SMALL.width // HEADS, window, kept)
        torch.testing.assert_close(layer(x, plan), by_hand(layer, x, position, window, kept), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("name", EVERY)
def test_shares_and_maps_by_hand(name: str, position: str, folder: Path) -> None:
    run = run_of(corpus_of(folder), name, folder.parent, position=position)
    model = random_model(name, position)
    rows = run.corpus.long_texts(LENGTH, 2)
    lead = 1 if run.variant.token else 0
    (first, pseudo), (map_RHSS, _) = measures.shares(run, model), measures.attention_maps(run, model, rows)
    batch = run.pack(rows)
    layer = model.attentions[0]
    with torch.no_grad():
        q, k, _ = layer.qkv(model.blocks[0].norm_1(model.embed(batch.tokens_T))).unflatten(1, (3, HEADS, -1)).unbind(1)  # pyright: ignore
        if position == "rope":
            q, k = rotate(q, rope_table(batch.positions_T, q.shape[-1])), rotate(k, rope_table(batch.positions_T, q.shape[-1]))
        q, k = [x.unflatten(0, (2, -1)).transpose(1, 2) for x in (q, k)]
        places = torch.arange(q.shape[2])
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if position == "alibi":
            scores = scores - headwise_gamma(HEADS)[:, None, None] * (places[:, None] - places)
        scores = scores.masked_fill(places > places[:, None], -math.inf)
        log_m = layer.mass(places).mass(CPU, len(places), len(places), torch.float32).table(len(places), torch.float32)
        columns = torch.cat([scores, log_m.expand(2, HEADS, len(places)).unsqueeze(-1)], dim=-1)
        expected = torch.softmax(columns, dim=-1)[..., :-1]
    torch.testing.assert_close(map_RHSS, expected, rtol=1e-4, atol=1e-5)
    assert measures.share_positions(LENGTH) == [1, 2, 4, 8, 12]
    whole = measures.attention_maps(run, model, run.corpus.long_texts(LENGTH, measures.TEXTS_FOR_SHARES))[0]
    assert first is not None
    assert pseudo is not None
    mean_S = whole[..., lead].mean((0, 1))
    assert first[0] == pytest.approx([mean_S[p + lead].item() for p in (1, 2, 4, 8, 12)], rel=1e-4)
    rest_S = 1 - whole[..., lead:].sum(-1).mean((0, 1))
    assert pseudo[0] == pytest.approx([rest_S[p + lead].item() for p in (1, 2, 4, 8, 12)], rel=1e-3, abs=1e-6)


def test_longer_texts_by_hand(folder: Path) -> None:
    for name in ("causal", "token-learned"):
        run = run_of(corpus_of(folder), name, folder.parent)
        model, lead = random_model(name, "rope"), 1 if named(name).token else 0
        found = measures.extrapolation(run, model)
        assert found is not None
        assert found["times"] == [1, 2, 4, 8]
        texts = run.corpus.long_texts(8 * LENGTH, 3)
        with torch.no_grad():
            for kept, values in found["kept"].items():
                losses = [model.losses(run.pack(row[None]), window=LENGTH, kept=int(kept))[lead:] for row in texts]
                mean_S = torch.stack(losses).mean(0)
                expected = [mean_S[x * LENGTH // 2 : x * LENGTH].mean().exp().item() for x in (1, 2, 4, 8)]
                assert values == pytest.approx(expected, rel=1e-4)
        # Within the training length there is nothing to keep.
        assert len({round(x, 2) for values in found["kept"].values() for x in values}) == 1 + 3 * len(found["kept"])


def test_without_long_documents_there_is_less_to_measure(tmp_path: Path) -> None:
    """Documents of 4 but not of 8 training lengths; and of less than one."""
    for characters, times in ((60, [1, 2, 4]), (8, None)):
        folder = tmp_path / str(characters)
        folder.mkdir()
        for i in range(30):
            (folder / f"{i}.txt").write_text("".join(chr(97 + (i * j * j + j) % 26) for j in range(characters)))
        run = run_of(corpus_of(folder, vocab=256), "causal", tmp_path / f"run{characters}", replace(SMALL, vocab=256, steps=2))
        train(run)
        found = measures.measure(run)
        assert (found["extrapolation"] and found["extrapolation"]["times"]) == times
        assert (found["first_token_share"] is None) == (found["maps"] is None) == (times is None)


def test_rescaled_rows_start_at_causal_s_size_and_a_faded_mass_comes_in() -> None:
    outs = {}
    for name in ("causal", "stablemask", "stablemask-rescaled", "stablemask-faded", "half-way"):
        layer = random_model("stablemask-faded" if name == "half-way" else name, "rope").attentions[0]
        with torch.no_grad():
            layer.qkv.weight[: 2 * SMALL.width] = 0  # all scores are 0
            layer.mass.progress = {"stablemask-faded": 0.0, "half-way": 0.5}.get(name, 1.0)
            torch.manual_seed(1)
            batch = pack(torch.arange(LENGTH + 1)[None], CPU, 300)
            outs[name] = layer(torch.randn(LENGTH, SMALL.width), Plan(batch, "rope", SMALL.width // HEADS))
    torch.testing.assert_close(outs["stablemask-rescaled"], outs["causal"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outs["stablemask-faded"], outs["causal"], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(outs["half-way"], outs["stablemask"])
    assert (outs["stablemask"] - outs["causal"]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("causal", [1, 1, 1, 1]),
        ("pseudo-0", [1 / 4, 2 / 4, 3 / 4, 1]),
        ("pseudo-0.01", [n / (n + (4 - n) * math.exp(0.01)) for n in (1, 2, 3, 4)]),
        ("token-fixed", [1 / 2, 2 / 3, 3 / 4, 4 / 5]),
        ("sink-learned", [1 / 2, 2 / 3, 3 / 4, 4 / 5]),
        ("sink-value", [1 / 2, 2 / 3, 3 / 4, 4 / 5]),
        ("token-learned", [1, 1, 1, 1]),
        ("stablemask-0.5", [n / (n + sum(math.exp(-0.5 * j) for j in range(n, 4))) for n in (1, 2, 3, 4)]),
    ],
)
def test_masses_by_hand(name: str, expected: list[float]) -> None:
    """What is real of a row whose scores are all 0, N = 4."""
    share = Mass(named(name), 1, 4, 8).share_at_scores_0(torch.arange(4))
    torch.testing.assert_close(share.detach(), torch.tensor([expected], dtype=torch.float32))
