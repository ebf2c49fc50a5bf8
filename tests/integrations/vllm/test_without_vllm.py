"""What of the adapter needs no vLLM: positions, the cut of a step, the share from two calls, settings, refusals of a config."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from sm_flex import headwise_gamma, log_mass, remask
from sm_flex_vllm import cpu_batch, settings, tables

CPU = torch.device("cpu")
REQUESTS = st.lists(st.tuples(st.integers(1, 700), st.integers(0, 900)), min_size=1, max_size=9)  # (rows, tokens before them)


def batch(requests: list[tuple[int, int]]) -> tuple[list[int], list[int], list[int]]:
    """vLLM's query_start_loc and seq_lens, and each row's position, counted out."""
    starts, lengths, positions = [0], [], []
    for rows, before in requests:
        starts.append(starts[-1] + rows)
        lengths.append(before + rows)
        positions += range(before, before + rows)
    return starts, lengths, positions


@given(requests=REQUESTS, padding=st.integers(0, 5))
def test_positions_are_those_counted_out(requests: list[tuple[int, int]], padding: int) -> None:
    starts, lengths, expected = batch(requests)
    query_start_loc, seq_lens = (torch.tensor(x, dtype=torch.int32) for x in (starts, lengths))
    found = tables.positions(query_start_loc, seq_lens, len(expected) + padding)
    assert found[: len(expected)].tolist() == expected
    assert found.dtype == torch.int64
    assert (found >= 0).all()


@given(requests=REQUESTS)
def test_every_row_is_in_one_part_of_the_cut(requests: list[tuple[int, int]]) -> None:
    starts, lengths, expected = batch(requests)
    rows, runs = cpu_batch.cut(starts, lengths)
    request_of = [i for i, (n, _) in enumerate(requests) for _ in range(n)]
    in_runs, in_tiles = [], []
    for run in runs:
        tiles = cpu_batch.tiles(run)
        assert all(tile.last - tile.first <= cpu_batch.TILE_ROWS for tile in tiles)
        for parts, seen in (([run], in_runs), (tiles, in_tiles)):
            for part in parts:
                seen += zip(range(part.first, part.last), cpu_batch.row_positions(part).tolist(), strict=True)
                for i, (a, b) in enumerate(zip(part.starts, part.starts[1:], strict=False)):
                    assert {request_of[part.first + r] for r in range(a, b)} == {part.request + i}
    alone = [(row, position) for row, _, position in rows]
    assert all(request_of[row] == request for row, request, _ in rows)
    everything = list(enumerate(expected))
    assert sorted(alone + in_runs) == everything
    assert sorted(alone + in_tiles) == everything
    assert all((requests[request_of[row]][0] <= cpu_batch.FEW_ROWS) == (row in dict(alone)) for row, _ in everything)


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal attention (R, H, D) with one sink per head, and its log-sum-exp without it."""
    scores = torch.einsum("qhd,khd->hqk", q, k).masked_fill(torch.ones(len(q), len(q), dtype=torch.bool).triu(1), -torch.inf)
    lse = scores.logsumexp(-1)
    whole = lse if sinks is None else torch.logaddexp(lse, sinks[:, None])
    return torch.einsum("hqk,khd->qhd", (scores - whole[..., None]).exp(), v), lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_the_share_of_two_calls_is_that_of_the_log_sum_exp(scale: float, dtype: torch.dtype) -> None:
    rows, heads = 60, 8
    q, k, v = (torch.randn(rows, heads, 16, dtype=torch.float64) for _ in range(3))
    q = q * scale
    mass = log_mass(headwise_gamma(heads).double(), torch.arange(rows), 50).t()  # N lies within: one row has no mass
    c = mass.amax(0)
    causal, lse = attention(q, k, v, None)
    with_c, _ = attention(q, k, v, c)
    share = cpu_batch.real_share(causal.to(dtype), with_c.to(dtype), mass.float(), c.float())
    expected = torch.sigmoid(lse.t() - mass)
    assert (share - expected).abs().max() < 2 * torch.finfo(dtype).eps
    other = torch.sigmoid(lse.t() - mass.roll(1, 0))
    assert (other - expected).abs().max() > 0.01


def test_the_share_where_there_is_nothing_to_compare() -> None:
    zero, one = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    assert cpu_batch.real_share(zero, zero, torch.zeros(1, 1), torch.zeros(1)).item() == 1  # 0 stays 0
    assert cpu_batch.real_share(one, one, torch.full((1, 1), -torch.inf), torch.tensor([-1e30])).item() == 1  # no mass
    assert cpu_batch.real_share(one, one / 2, torch.full((1, 1), -torch.inf), torch.tensor([3.0])).item() == 1


@pytest.mark.parametrize("dtype", cpu_batch.HALF_ULP)
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_a_head_that_is_left_out_would_not_have_changed(dtype: torch.dtype, soft_cap: float) -> None:
    rows, heads, first = 40, 8, 600
    q, k, v = (torch.randn(rows, n, 16).to(dtype) for n in (heads, 2, heads))
    keys = k.repeat_interleave(heads // 2, 1)
    scores = torch.einsum("qhd,khd->qhk", q.double(), keys.double()) * 0.3
    scores = torch.tanh(scores / soft_cap) * soft_cap if soft_cap else scores
    own = cpu_batch.least_lse(q, k, 0.3)
    own = cpu_batch.soft_capped(own, soft_cap) if soft_cap else own
    torch.testing.assert_close(own.double(), scores.diagonal(dim1=0, dim2=2).t(), atol=0.05, rtol=0.01)
    lse = scores.masked_fill(torch.ones(rows, rows, dtype=torch.bool).triu(1)[:, None], -torch.inf).logsumexp(-1)
    mass = log_mass(headwise_gamma(heads).double(), torch.arange(first, first + rows), 4096).t()
    needed = cpu_batch.heads_that_need_it(mass.float(), own, dtype)
    left_out = [head for head, need in enumerate(needed) if not need]
    assert left_out
    assert any(needed)
    causal = v.transpose(0, 1)
    new = remask(causal, lse.t().contiguous(), mass.t().contiguous())[0]
    assert all(torch.equal(new[head], causal[head]) for head in left_out)
    assert cpu_batch.heads_that_need_it(mass.float(), None, dtype) == [True] * heads


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_the_bound_of_the_log_sum_exp_is_one(scale: float) -> None:
    """For the rows of a tile behind two others."""
    rows, heads, first = 50, 8, 30
    q, k = torch.randn(rows, heads, 16), torch.randn(rows, 2, 16) + 1
    scores = torch.einsum("qhd,khd->qhk", q, k.repeat_interleave(heads // 2, 1)) * scale
    lse = scores.masked_fill(torch.ones(rows, rows, dtype=torch.bool).triu(1)[:, None], -torch.inf).logsumexp(-1)[first:]
    earlier = cpu_batch.with_these(cpu_batch.with_these(None, k[:11]), k[11:first])
    assert earlier.keys == first
    torch.testing.assert_close(earlier.mean_KD, k[:first].mean(0))
    alone, bound = (cpu_batch.least_lse(q[first:], k[first:], scale, x) for x in (None, earlier))
    assert (bound <= lse + 1e-4 * lse.abs()).all()
    assert (alone <= bound).all()
    assert scale > 0.1 or (lse - bound).max() < 1 < (lse - alone).max()


@pytest.mark.parametrize("dtype", cpu_batch.HALF_ULP)
def test_the_bound_holds_where_keys_share_a_large_part(dtype: torch.dtype) -> None:
    """As with a bias on the keys: each product is large, and one that its dtype rounds would be off by more than 1."""
    rows, heads = 20, 4
    q, k = (torch.randn(rows, heads, 64) * 8).to(dtype), (torch.randn(rows, 2, 64) + torch.randn(64) * 100).to(dtype)
    scores = torch.einsum("qhd,khd->qhk", q.double(), k.double().repeat_interleave(2, 1)) * 0.125
    lse = scores.masked_fill(torch.ones(rows, rows, dtype=torch.bool).triu(1)[:, None], -torch.inf).logsumexp(-1)
    alone = cpu_batch.least_lse(q, k, 0.125)
    assert (alone - scores.diagonal(dim1=0, dim2=2).t()).abs().max() < 0.01
    bound = cpu_batch.least_lse(q[10:], k[10:], 0.125, cpu_batch.with_these(None, k[:10]))
    assert (bound <= lse[10:] + 0.01).all()


@pytest.mark.parametrize(("needed", "expected"), [([], None), ([5], (1, 2)), ([2, 5], (0, 2)), ([0, 11], (0, 3))])
def test_kv_heads_hold_the_query_heads_that_are_needed(needed: list[int], expected: tuple[int, int] | None) -> None:
    assert cpu_batch.kv_heads_of([head in needed for head in range(12)], 4) == expected


def test_the_table_is_log_mass_by_position() -> None:
    gamma = tuple(headwise_gamma(4).double().tolist())
    table = tables.table(gamma, 20, None, 33, torch.device("cpu"))
    assert table.shape == (33, 4)
    assert table.is_contiguous()
    torch.testing.assert_close(table.t(), log_mass(torch.tensor(gamma), torch.arange(33), 20))
    assert tables.table(gamma, 20, None, 33, torch.device("cpu")) is table
    sinks = torch.tensor([0.5, -1.0, 2.0, -torch.inf], dtype=torch.bfloat16)
    both = tables.add_sinks(table, sinks)
    torch.testing.assert_close(both.exp(), table.exp() + sinks.float().exp())


def engine_config(**changes: Any) -> Any:
    """What settings.py reads of a VllmConfig, as vLLM has it for a Llama."""
    text = LlamaConfig(num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=2, max_position_embeddings=64)
    text.stablemask = changes.pop("stablemask", {"gamma": "headwise", "length": 32})
    drafts = changes.pop("method", None)
    model = {
        "hf_config": text, "hf_text_config": text, "max_model_len": 64, "is_encoder_decoder": False, "use_mla": False,
        "uses_mrope": False, "is_mm_prefix_lm": False, "is_diffusion": False, "attention_chunk_size": None, "rswa_window": None,
    }  # fmt: skip
    parallel = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    others = {"use_non_causal": False, "kv_sharing_fast_prefill": False}
    for part in (model, parallel, others):
        part.update({name: changes.pop(name) for name in list(changes) if name in part})
    assert not changes
    return SimpleNamespace(
        model_config=SimpleNamespace(**model),
        parallel_config=SimpleNamespace(**parallel),
        attention_config=SimpleNamespace(**others),
        cache_config=SimpleNamespace(**others),
        speculative_config=drafts and SimpleNamespace(method=drafts, num_speculative_tokens=3),
    )


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_rank_has_the_gammas_of_its_own_heads(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_tensor_parallel", lambda: (rank, 4))
    found = settings.Settings(engine_config()).layer(1, 2)
    assert found.length == 32
    assert list(found.gamma) == headwise_gamma(8).double()[2 * rank : 2 * rank + 2].tolist()
    with pytest.raises(ValueError, match="layer 1 has 8 query heads by the config, and vLLM serves 3 on each of 4"):
        settings.Settings(engine_config()).layer(1, 3)


def test_one_gamma_for_all_heads_and_a_length_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_tensor_parallel", lambda: (0, 1))
    found = settings.Settings(engine_config(stablemask={"gamma": 0.25}, method="ngram"))
    assert found.layer(0, 8) == settings.Layer((0.25,) * 8, 64)
    assert str(found) == "8 heads, N = 64"
    table = found.table(0, 8, torch.device("cpu"))
    assert table.shape == (64 + 3 + 1, 8)
    assert found.table(1, 8, torch.device("cpu")) is table


def by_layers(*shape: int) -> Any:
    return torch.randn(2, *shape, dtype=torch.float64).tolist()


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("heads", [8, 2])
def test_a_rank_has_the_sinks_of_its_own_heads(rank: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels join log M. With a value, for query heads or key heads, they stay apart: the epilogue needs both."""
    monkeypatch.setattr(settings, "_tensor_parallel", lambda: (rank, 4))
    levels, values, own = by_layers(8), by_layers(heads, 16), slice(2 * rank, 2 * rank + 2)
    given = {"gamma": "headwise", "length": 32, "sink": levels}
    found = settings.Settings(engine_config(stablemask=given))
    assert found.sink(1, 2, 16, CPU) is None
    assert str(found) == "8 heads, N = 32, sinks"
    gammas, own_levels = headwise_gamma(8).double()[own], torch.tensor(levels[1])[own]
    mass = log_mass(gammas, torch.arange(65), 32).t()
    torch.testing.assert_close(found.table(1, 2, CPU), torch.logaddexp(mass, own_levels).float())

    found = settings.Settings(engine_config(stablemask={**given, "sink_value": values}))
    assert str(found) == "8 heads, N = 32, sinks with values"
    torch.testing.assert_close(found.table(1, 2, CPU), mass.float())
    sink = found.sink(1, 2, 16, CPU)
    assert sink is not None
    torch.testing.assert_close(sink.level_H, own_levels.float())
    torch.testing.assert_close(sink.value_HD, torch.tensor(values[1]).repeat_interleave(8 // heads, 0)[own].float())
    with pytest.raises(ValueError, match=f"layer 1 must have 24 numbers .* got 16 numbers for {heads} heads"):
        found.sink(1, 2, 24, CPU)


def test_a_sink_alone_is_all_the_mass_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_tensor_parallel", lambda: (0, 1))
    found = settings.Settings(engine_config(stablemask={"sink": [None, [float(i) for i in range(8)]]}))
    assert found.table(0, 8, CPU).eq(-torch.inf).all()
    assert found.table(1, 8, CPU).eq(torch.arange(8)).all()


BAD = [
    ({"gamma": -1}, ValueError, "gamma.*must be >= 0"),
    ({"gamma": [0.5] * 3}, ValueError, "one number for each of the model's 8 query heads"),
    ({"gamma": "wide"}, TypeError, 'must be "headwise", a number or a list'),
    ({"length": 0}, ValueError, "length.*at least 1"),
    ({"length": 12.5}, TypeError, "length.*must be an int"),
    ({"slope": 1}, ValueError, "got 'slope'"),
    ("headwise", TypeError, "must be a dict"),
]


@pytest.mark.parametrize(("stablemask", "error", "words"), BAD, ids=str)
def test_wrong_settings(stablemask: Any, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_tensor_parallel", lambda: (0, 1))
    assert settings.asks(engine_config(stablemask=stablemask).model_config)
    with pytest.raises(error, match=words):
        settings.Settings(engine_config(stablemask=stablemask))


REFUSED = [
    ({"attn_type": "encoder_only"}, "encoder"),
    ({"is_encoder_decoder": True}, "encoder"),
    ({"use_mla": True}, "latent attention"),
    ({"uses_mrope": True}, "several axes"),
    ({"is_mm_prefix_lm": True}, "prefix-LM"),
    ({"is_diffusion": True}, "diffusion"),
    ({"use_non_causal": True}, "without a causal mask"),
    ({"attention_chunk_size": 8192}, "attention_chunk_size"),
    ({"rswa_window": 64}, "R-SWA"),
    ({"decode_context_parallel_size": 2}, "context parallelism"),
    ({"prefill_context_parallel_size": 2}, "context parallelism"),
    ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
    ({"method": "eagle"}, "speculative decoding by eagle"),
    ({"alibi_slopes": [0.5]}, "ALiBi"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=str)
def test_what_is_refused_by_the_config(changes: dict[str, Any], words: str) -> None:
    attn_type, slopes = changes.get("attn_type", "decoder"), changes.get("alibi_slopes")
    changes = {name: value for name, value in changes.items() if name not in ("attn_type", "alibi_slopes")}
    with pytest.raises(NotImplementedError, match=f"stablemask is set, and StableMask does not serve.*{words}"):
        settings.check(engine_config(**changes), attn_type, slopes)


@pytest.mark.parametrize("method", [None, *settings.DRAFTS])
def test_what_is_not_refused(method: str | None) -> None:
    settings.check(engine_config(method=method), "decoder", None)


def test_who_asks() -> None:
    assert not settings.asks(None)
    assert not settings.asks(engine_config(stablemask=None).model_config)
    assert settings.asks(engine_config(stablemask={}).model_config)
    layered = engine_config(stablemask=None)
    layered.model_config.hf_config.per_layer_config = {i: {"stablemask": {"gamma": i}} for i in range(2)}
    assert settings.asks(layered.model_config)
    # a whole that has it, and a text that has not
    whole = engine_config(stablemask=None)
    whole.model_config.hf_config = engine_config().model_config.hf_config
    assert settings.asks(whole.model_config)
