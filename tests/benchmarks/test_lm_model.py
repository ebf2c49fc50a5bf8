"""The rooms of benchmarks.lm: text, tokens, the model's attention, and what is measured of it, each against it by hand."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.lm import measures as lm_measures
from benchmarks.lm import text as lm_text
from benchmarks.lm import tokens as lm_tokens
from benchmarks.lm import train as lm_train
from benchmarks.lm.model import Attention, Decoder, Plan, rope_table, rotate
from benchmarks.lm.variants import ALL, Mass, named
from sm_flex import headwise_gamma
from tests.helpers.lm import CPU, SMALL, corpus_of, piece_of, write_folder

EVERY = [v.name for v in ALL]
LENGTH, HEADS = SMALL.length, SMALL.heads


@pytest.fixture(autouse=True)
def _cache_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(lm_tokens, "CACHE", tmp_path / "cache")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "text")


def test_packing_by_hand() -> None:
    # Documents sep a b, sep c d e f g, sep h i in rows of 5; the last is not whole and is left out.
    rows_RL = lm_text.cut_rows([b"ab", b"cdefg", b"hi"], 5)
    sep, text = lm_text.SEPARATOR, {letter: ord(letter) for letter in "abcdefghi"}
    a, b, c, d, e, f, g, h, _ = text.values()
    assert rows_RL.tolist() == [[sep, a, b, sep, c, d], [d, e, f, g, sep, h]]
    batch = lm_text.pack(rows_RL, CPU)
    assert batch.tokens_T.tolist() == [sep, a, b, sep, c, d, e, f, g, sep]
    assert batch.targets_T.tolist() == [a, b, -100, c, d, e, f, g, -100, h]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 9, 10]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.rows == 2


def test_an_artificial_token_is_before_each_row_and_predicts_nothing() -> None:
    rows_RL = torch.tensor([[9, 1, 2, 9, 3], [4, 5, 9, 6, 7]])
    batch = lm_text.pack(rows_RL, CPU, separator=9, lead=10)
    assert batch.tokens_T.tolist() == [10, 9, 1, 2, 9, 10, 4, 5, 9, 6]
    assert batch.targets_T.tolist() == [-100, 1, 2, -100, 3, -100, 5, -100, 6, 7]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 8, 10]
    plain = lm_text.pack(rows_RL, CPU, separator=9)
    assert plain.targets_T[plain.targets_T != -100].tolist() == batch.targets_T[batch.targets_T != -100].tolist()


def test_batches_take_every_row_once_before_any_again() -> None:
    rows_RL = torch.arange(7)[:, None]
    source = lm_text.batches(rows_RL, 3, seed=1)
    epochs = [sorted([*next(source).flatten().tolist(), *next(source).flatten().tolist()]) for _ in range(5)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_training_and_validation_share_no_document(folder: Path) -> None:
    text = lm_text.read_text(folder)
    assert set(text.training).isdisjoint(text.validation)
    whole = sorted(f.read_bytes() for f in folder.rglob("*.txt") if f.name != "again.txt")
    assert sorted(text.training + text.validation) == whole  # each once, the duplicate and the picture left out
    (folder / "0.txt").rename(folder / "elsewhere.txt")
    assert lm_text.read_text(folder) == text  # names and places do not matter


def test_one_file_is_split_by_length(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_bytes(bytes(range(97, 117)))
    assert lm_text.read_text(file)[:2] == ([bytes(range(97, 115))], [bytes(range(115, 117))])


def test_the_default_text_is_the_standard_library() -> None:
    text = lm_text.read_text(None)
    assert len(text.training) > 100
    assert set(text.training).isdisjoint(text.validation)
    assert any(b"class JSONDecoder" in document for document in text.training + text.validation)


def documents_of(line: Tensor, corpus: lm_tokens.Corpus) -> list[list[int]]:
    documents: list[list[int]] = []
    for token in line.tolist():
        if token == corpus.separator:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents


def test_tokens_are_the_documents_and_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, corpus = lm_text.read_text(folder), corpus_of(folder)
    (kept,) = lm_tokens.CACHE.glob("*.json")
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel

    tokenizer = Tokenizer.from_file(str(kept))
    tokenizer.decoder = ByteLevel()  # pyright: ignore
    for line, documents in ((corpus.training, text.training), (corpus.validation, text.validation)):
        found = documents_of(line, corpus)
        assert [tokenizer.decode(tokens).encode() for tokens in found] == documents
        assert [int(corpus.bytes_of[tokens].sum()) for tokens in found] == [len(document) for document in documents]
    assert corpus.bytes_of[corpus.separator] == corpus.bytes_of[corpus.artificial] == 0
    assert corpus.bytes_of.max() > 3  # it did learn words
    monkeypatch.setattr(lm_tokens, "BpeTrainer", None)
    monkeypatch.setattr(lm_tokens, "_line", None)
    again = corpus_of(folder)
    assert torch.equal(again.training, corpus.training)
    assert corpus_of(folder).fingerprint == corpus.fingerprint


def test_the_tokenizer_never_sees_the_validation_text(folder: Path) -> None:
    corpus, text = corpus_of(folder), lm_text.read_text(folder)
    other = lm_tokens.tokenise(text._replace(validation=[b"entirely other words, over and over " * 50]), SMALL.vocab)
    assert torch.equal(other.training, corpus.training)
    assert other.fingerprint != corpus.fingerprint


def test_long_texts_are_within_one_document(folder: Path) -> None:
    corpus = corpus_of(folder)
    rows = corpus.long_texts(50, 7)
    assert rows.shape == (7, 51)
    assert not (rows == corpus.separator).any()
    whole = [bytes(str(d), "ascii").strip(b"[]") for d in documents_of(corpus.validation, corpus)]
    assert all(any(bytes(str(row), "ascii").strip(b"[]") in document for document in whole) for row in rows.tolist())
    assert len(corpus.long_texts(10**6, 7)) == 0


@pytest.mark.parametrize("name", ["wikitext-103", "minipile"])
def test_a_dataset_in_the_format_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    home = tmp_path / "dataset"
    home.mkdir()
    lines = {
        "train": ["", " = One = \n", "", " First line . \n", " = = Section = = \n", " Second . \n", " = Two = \n", " Third . \n"],
        "validation": [" = Three = \n", " Fourth . \n"],
    }
    for part, text in lines.items():
        datasets.Dataset.from_dict({"text": text}).to_parquet(str(home / f"{part}-00000-of-00001.parquet"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setitem(lm_tokens.DATASETS, name, (str(home), None))
    text = lm_tokens.read_dataset(name)
    if name == "minipile":  # a document a row
        assert text.training == [line.encode() for line in lines["train"] if line]
    else:  # a line a row, an article from title to title
        one = " = One = \n\n First line . \n = = Section = = \n Second . \n"
        assert text.training == [one.encode(), b" = Two = \n Third . \n"]
        assert text.validation == [b" = Three = \n Fourth . \n"]


def test_a_dataset_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setitem(lm_tokens.DATASETS, "minipile", (str(tmp_path / "nothing"), None))
    with pytest.raises(ValueError, match="--dataset: minipile could not be loaded from"):
        lm_tokens.read_dataset("minipile")


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
        batch = lm_text.pack(lm_text.rows_of(line[:27], 13), CPU, SMALL.vocab, lead)
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
            scores = random_model(name, position)(lm_text.pack(lm_text.rows_of(line, 13), CPU, 300))
        torch.testing.assert_close(scores[8:13], scores[:5], rtol=1e-4, atol=1e-4)


def by_hand(layer: Attention, x: Tensor, position: str, window: int, kept: int) -> Tensor:
    """Query by query, against a cache of the first kept and the most recent tokens, positions counted in the cache."""
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
        weights = torch.softmax(torch.cat([scores, log_m.expand(HEADS, 1)], dim=1), dim=1)[:, :-1]
        rows.append(torch.einsum("hk,khd->hd", weights, v[keys]).flatten())
    return layer.out(torch.stack(rows))


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize(("window", "kept"), [(5, 0), (8, 4), (5, 1), (40, 0)])
@pytest.mark.parametrize("name", ["causal", "stablemask", "pseudo-0.01", "sink-learned"])
def test_window_attention_is_a_cache_of_recent_and_kept_tokens(name: str, window: int, kept: int, position: str) -> None:
    layer = random_model(name, position).attentions[0]
    torch.manual_seed(3)
    x = torch.randn(2 * LENGTH, SMALL.width)
    rows = torch.arange(2 * LENGTH + 1)[None]
    with torch.no_grad():
        plan = Plan(lm_text.pack(rows, CPU, -1), position, SMALL.width // HEADS, window, kept)
        torch.testing.assert_close(layer(x, plan), by_hand(layer, x, position, window, kept), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("name", EVERY)
def test_shares_and_maps_by_hand(name: str, position: str, folder: Path) -> None:
    piece = piece_of(corpus_of(folder), name, folder.parent, position=position)
    model = random_model(name, position)
    rows = piece.corpus.long_texts(LENGTH, 2)
    lead = 1 if piece.variant.token else 0
    (first, pseudo), (map_RHSS, _) = lm_measures.shares(piece, model), lm_measures.attention_maps(piece, model, rows)
    batch = piece.pack(rows)
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
    assert lm_measures.share_positions(LENGTH) == [1, 2, 4, 8, 12]
    whole = lm_measures.attention_maps(piece, model, piece.corpus.long_texts(LENGTH, lm_measures.TEXTS_FOR_SHARES))[0]
    assert first is not None
    assert pseudo is not None
    mean_S = whole[..., lead].mean((0, 1))
    assert first[0] == pytest.approx([mean_S[p + lead].item() for p in (1, 2, 4, 8, 12)], rel=1e-4)
    rest_S = 1 - whole[..., lead:].sum(-1).mean((0, 1))
    assert pseudo[0] == pytest.approx([rest_S[p + lead].item() for p in (1, 2, 4, 8, 12)], rel=1e-3, abs=1e-6)


def test_longer_texts_by_hand(folder: Path) -> None:
    for name in ("causal", "token-learned"):
        piece = piece_of(corpus_of(folder), name, folder.parent)
        model, lead = random_model(name, "rope"), 1 if named(name).token else 0
        found = lm_measures.extrapolation(piece, model)
        assert found is not None
        assert found["times"] == [1, 2, 4, 8]
        texts = piece.corpus.long_texts(8 * LENGTH, 3)
        with torch.no_grad():
            for kept, values in found["kept"].items():
                losses = [model.losses(piece.pack(row[None]), window=LENGTH, kept=int(kept))[lead:] for row in texts]
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
        piece = piece_of(
            corpus_of(folder, vocab=256), "causal", tmp_path / f"run{characters}", replace(SMALL, vocab=256, steps=2)
        )
        lm_train.train(piece, lambda piece, speed: None)
        found = lm_measures.measure(piece)
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
            batch = lm_text.pack(torch.arange(LENGTH + 1)[None], CPU, 300)
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
        ("token-learned", [1, 1, 1, 1]),
        ("stablemask-0.5", [n / (n + sum(math.exp(-0.5 * j) for j in range(n, 4))) for n in (1, 2, 3, 4)]),
    ],
)
def test_masses_by_hand(name: str, expected: list[float]) -> None:
    """What is real of a row whose scores are all 0, N = 4."""
    share = Mass(named(name), 1, 4).share_at_scores_0(torch.arange(4))
    torch.testing.assert_close(share.detach(), torch.tensor([expected], dtype=torch.float32))
