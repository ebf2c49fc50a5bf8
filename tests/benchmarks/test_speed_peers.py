"""benchmarks.speed's peers and growth: what is wrong is found by the check, and what cannot run says so."""

import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.speed import cli, growth, peer_rows, peers, timing
from benchmarks.speed.cases import Case
from benchmarks.speed.peers import LEARNED, Peer
from benchmarks.speed.variants import setup
from sm_flex.testing import oracle

CPU = torch.device("cpu")
TINY: dict[str, Any] = {"head_dim": 16, "heads": 2, "kv_heads": 2, "dtype": "fp32", "threads": 1}
CASE = Case("peers", (), 80, 2, **TINY)


def right(at: Any) -> timing.Call:
    return peers.ours(at, LEARNED)


def changed(wrong: str) -> Callable[[Any], timing.Call]:
    def build(at: Any) -> timing.Call:
        if wrong == "not installed":
            raise ModuleNotFoundError("No module named 'nobody'", name="nobody")
        inner = peers.ours(at, LEARNED)

        def call(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
            if wrong == "no gradient":
                return inner(q, k, v, sink.detach())
            if wrong == "another value":
                return inner(q, k, v, sink + 0.1)
            if wrong == "half a gradient":
                return inner(q, k, v, sink.detach() + 0.5 * (sink - sink.detach()))
            if wrong == "wide":
                return inner(q, k, v, sink).double()
            if wrong == "no backward" and q.requires_grad:
                raise NotImplementedError("no backward here")
            if wrong == "fails":
                raise RuntimeError("never works")
            return inner(q, k, v, sink)

        return call

    return build


def rows_of(monkeypatch: pytest.MonkeyPatch, chosen: dict[str, Peer], case: Case = CASE) -> dict[str, dict[str, Any]]:
    for key, peer in chosen.items():
        monkeypatch.setitem(peers.ALL, key, peer)
    rows = peer_rows.peer_rows(case._replace(engines=tuple(chosen)), CPU, 0.0)
    return {row["variant"]: row for row in rows}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("nothing", []),
        ("no gradient", ["d sink is dropped: None"]),
        ("half a gradient", ["d sink off by 5.0e-01 of its largest value"]),
        ("wide", ["returns float64"]),
        ("no backward", ["no backward: NotImplementedError: no backward here"]),
    ],
)
def test_what_a_peer_gets_wrong_stands_beside_its_time(wrong: str, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(monkeypatch, {"peer": Peer("peer", LEARNED, changed(wrong))})
    row = rows["peer"]
    assert row["wrong"] == said
    against = f"sm_flex, {LEARNED}" + ", no gradients" * (wrong == "no backward")
    assert row["against"] == against
    assert set(row["ratio"]["sm_flex"]) - {"host"} == ({"forward"} if wrong == "no backward" else set(timing.MODES))
    assert row["peak_ratio"] == pytest.approx(row["peak_bytes"] / rows[against]["peak_bytes"])
    assert rows[f"sm_flex, {LEARNED}"]["check"] < 1e-5


def test_a_value_beyond_tolerance_is_named_for_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows_of(monkeypatch, {"peer": Peer("peer", LEARNED, changed("another value"))})["peer"]["wrong"]
    assert [text.split(" off by")[0] for text in found] == ["out", "dq", "dk", "dv", "d sink"]


def test_what_cannot_run_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_rows, "needed_bytes", lambda peer, case, device: 1e15 if peer.name == "large" else 0)
    rows = rows_of(
        monkeypatch,
        {
            "a": Peer("absent", LEARNED, changed("not installed")),
            "b": Peer("large", LEARNED, right),
            "c": Peer("broken", LEARNED, changed("fails")),
        },
    )
    assert rows["absent"]["why"] == "not installed: no module nobody; pip install sm-flex[peers]"
    assert rows["large"]["why"].startswith("needs 931323 GiB, ")
    assert rows["broken"]["error"] == "RuntimeError: never works"
    assert not any("ms" in rows[name] for name in ("absent", "large", "broken"))
    assert "ms" in rows[f"sm_flex, {LEARNED}"]


def test_ours_is_not_timed_where_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_rows, "ours", lambda at, mass: changed("half a gradient")(at))
    rows = rows_of(monkeypatch, {"peer": Peer("peer", LEARNED, right)})
    assert rows[f"sm_flex, {LEARNED}"]["error"] == "d sink off by 5.0e-01 of its largest value"
    assert "ms" not in rows[f"sm_flex, {LEARNED}"]
    assert "ratio" not in rows["peer"]


def test_the_reference_is_eq_11_beyond_the_length_that_is_checked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last rows alone: gradients of all keys and of the sink against autograd through the whole oracle."""
    monkeypatch.setattr(peer_rows, "CHECK_ALL", 100)
    case = CASE._replace(length=130)
    at = setup(case, CPU)
    inputs = peer_rows.with_sink(timing.input_sets(2, 130, (2, 2), 16, torch.float32, CPU)[0])
    reference = peer_rows.Reference(at, inputs)
    *leaves, _ = (x.detach().double().requires_grad_() for x in inputs)
    out, _ = oracle(*leaves[:3], gamma=math.inf, sink=leaves[3])
    dq, dk, dv, d_sink = torch.autograd.grad(out, leaves, reference.grad.double())
    rows = [*range(48), *range(82, 130)]
    wanted = (out[-1:, :, rows], dq[-1:, :, rows], dk[-1:], dv[-1:], d_sink)
    for ours, exact in zip(reference.wanted(LEARNED), wanted, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


def test_bytes_of_a_dense_peer_are_known_beforehand() -> None:
    for key in ("transformers", "dense"):
        for length in (256, 1024, 2048):
            case = CASE._replace(length=length, batch=1)
            call = peers.ALL[key].build(setup(case, CPU))
            inputs = peer_rows.with_sink(timing.input_sets(1, length, (2, 2), 16, torch.float32, CPU)[0])
            peak = timing.training_peak(call, inputs, CPU)
            assert peer_rows.needed_bytes(peers.ALL[key], case, CPU) == pytest.approx(peak, rel=0.02)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("key", "module"), [("softmax-n", "flash_attention_softmax_n"), ("x-transformers", "x_transformers")])
def test_installed_peers_are_right_or_absent_ones_say_so(key: str, module: str) -> None:
    rows = peer_rows.peer_rows(CASE._replace(engines=(key, "transformers", "flex lse")), CPU, 0.0)
    row = next(row for row in rows if row["variant"] == peers.ALL[key].name)
    if find_spec(module) is None:
        assert row["why"].startswith("not installed")
    else:
        assert row["wrong"] == []
        assert row["check"] < 1e-5
    eager = next(row for row in rows if row["variant"] == peers.ALL["transformers"].name)
    assert eager["wrong"] == []
    flex = next(row for row in rows if row["variant"] == peers.ALL["flex lse"].name)
    assert "does not support backward on CPU" in flex["wrong"][0]
    assert set(flex["ms"]) == {"forward"}


def test_peers_and_growth_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOST_SECONDS", "LEAST_SECONDS"):
        monkeypatch.setattr(cli, name, 0.0)
    monkeypatch.setattr(cli, "copy_bandwidth", lambda device: 10.0)
    chosen = [CASE._replace(engines=("transformers", "dense", "softmax-n slow")), Case("growth", ("cpu",), 2048, 1, **TINY)]
    cli.main(["--device", "cpu", "--out", str(tmp_path)], chosen)
    record = json.loads(next(tmp_path.glob("speed_*.json")).read_text())
    assert [row["error"] for row in record["rows"] if "error" in row] == []
    extra = [row for row in record["rows"] if "extra ms" in row]
    assert [row["length"] for row in extra] == [32, 64, 128, 256, 512, 1024, 2048]
    assert all(0 < row["check"] < 1e-5 for row in extra)
    fitted = [row for row in record["rows"] if row["role"] == "fit"]
    assert [row["mode"] for row in fitted] == ["forward", "forward+backward"]
    text = next(tmp_path.glob("speed_*.md")).read_text()
    assert "## Peers" in text
    assert "| transformers, eager | learned sink | " in text
    assert "## Growth" in text
    assert next(tmp_path.glob("speed_*-growth.png")).stat().st_size > 1000


def test_long_rounds_of_growth_are_forward_alone_or_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "LONGEST_ROUND", 20.0)
    took = iter([0.0, 0.0, 0.0, 0.1, 6.0, 18.0])
    compared: list[tuple[int, bool]] = []

    def compare(at: Any, made: dict[str, Any], seconds: float) -> tuple[dict[str, Any], float]:
        compared.append((at.length, made[growth.OURS].backward))
        return {}, next(took)

    monkeypatch.setattr(growth, "_compare", compare)
    rows = growth.growth_rows(Case("growth", ("cpu",), 2048, 1, **TINY), CPU, 10.0, 0.0)
    assert compared == [(n, n < 1024) for n in (32, 64, 128, 256, 512, 1024)]
    assert rows[-1] == {
        "variant": "StableMask less plain causal", "length": 2048, "why": "not run: a round forward alone would take 72 s",
    }  # fmt: skip


@pytest.mark.parametrize("c", [0.0, 1e-8])
def test_the_fit_finds_the_line_and_a_quadratic_part_where_there_is_one(c: float) -> None:
    lengths = [1024 << k for k in range(7)]
    random = np.random.default_rng(0)

    def spread(ms: float, rounds: int) -> dict[str, float]:
        return {"median": ms, "p20": 0.99 * ms, "p80": 1.01 * ms, "rounds": rounds}

    plain = [spread(2e-7 * n * n + 1e-3 * n, 9) for n in lengths]
    extra = [0.3 + 5e-4 * n + c * n * n + random.normal() * 0.01 * p["median"] / 3 for n, p in zip(lengths, plain, strict=True)]
    measured = [
        {"median": y, "p20": y - 0.01 * p["median"], "p80": y + 0.01 * p["median"], "rounds": 9}
        for y, p in zip(extra, plain, strict=True)
    ]
    found = growth.fit(lengths, measured, plain)
    assert abs(found["b ns"] - 500) < 3 * found["b error"]
    assert abs(found["c of causal's"] - c / 2e-7) < 3 * found["its error"]
    assert (found["c in its errors"] > 2) == (c > 0)


def test_bytes_of_a_row_are_those_of_the_ops() -> None:
    """lse - log M, sigmoid, logaddexp, the product: counted from the tensors of a float32 and a bf16 call."""
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        out, lse, table = torch.ones(1, 64, dtype=dtype), torch.ones(1), torch.ones(1)
        gap = lse - table
        share = gap.sigmoid()
        moved = [lse, table, gap, gap, share, lse, table, torch.logaddexp(lse, table), share.to(dtype), out, out]
        moved += [share, share.to(dtype)] if size != 4 else []
        assert growth.row_bytes(64, size) == sum(x.numel() * x.element_size() for x in moved)
