"""benchmarks.speed at a tiny size: what it measures, writes and refuses, and how it judges its targets."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.lm.plot_style import points
from benchmarks.speed import cases, cli, decode, figures, targets, timing, variants
from benchmarks.speed.cases import Case
from benchmarks.speed.check import error_of
from sm_flex import stablemask
from sm_flex.engines import choose
from sm_flex.runtime import BEFORE_2_14

CPU = torch.device("cpu")
TINY: dict[str, Any] = {"head_dim": 16, "heads": 2, "kv_heads": 1, "dtype": "fp32", "threads": 1}
ATTENTION = Case("attention", ("cpu", "dense"), 80, 2, **TINY)
CASES = [
    ATTENTION,
    ATTENTION._replace(engines=("cpu",), kind="window", length=1100, batch=1),
    ATTENTION._replace(engines=("cpu",), kind="alibi", dtype="bf16"),
    ATTENTION._replace(engines=("varlen",), kind="packed"),
    Case("memory", ("cpu",), 256, 1, **TINY),
    Case("epilogue", (), 64, 2, **TINY),
    Case("decode", (), 64, 2, **TINY),
]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(cli, "MOST_SECONDS", 0.0)
    monkeypatch.setattr(cli, "LEAST_SECONDS", 0.0)


def measured(chosen: list[Case], folder: Path, *options: str) -> dict[str, Any]:
    cli.main(["--device", "cpu", "--out", str(folder), *options], chosen)
    return json.loads(next(folder.glob("speed_*.json")).read_text())


@pytest.mark.usefixtures("quick")
def test_every_kind_of_case_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = measured(CASES, tmp_path)
    rows = record["rows"]
    assert [row for row in rows if "error" in row] == []
    assert record["dropped"] == []
    assert {row["case"] for row in rows} == {case.name for case in CASES}
    for row in rows:
        if row["group"] == "attention" and row["gamma"]:
            assert 0 < row["check"] < (0.04 if row["dtype"] == "bf16" else 1e-5)
        if row["group"] == "attention":
            assert row["ms"]["forward"]["rounds"] == timing.LEAST_ROUNDS
            assert row["backward"] == ("forward+backward" in row["ms"])
            if row["backward"]:
                forward, backward, both = (row["ms"][mode]["median"] for mode in timing.MODES)
                assert min(forward, backward) < both
        if row["role"] in ("StableMask", "floor") and row["group"] == "attention":
            assert set(row["ratio"]) == {"same engine"}
        assert ("beyond floor" in row) == (
            row["role"] == "StableMask" and row["kind"] == "causal" and row["group"] == "attention"
        )
    alone = [row["variant"] for row in rows if row["group"] == "attention" and not row["backward"]]
    assert alone == ["cpu, floor", *(f"cpu, no gradients, {what}" for what in ("plain", "StableMask", "floor"))]
    dense = next(row for row in rows if row["engine"] == "dense")
    assert set(dense["ratio"]) == {"StableMask"}
    peaks = {row["variant"]: row["peak_bytes"] for row in rows if row["group"] == "memory"}
    own = (256 * 16 * 4) * (2 * 2 + 2 * 1)  # q, k, v and the gradient of the output
    assert all(own < peak < 20 * own for peak in peaks.values())
    steps = {row["role"]: row for row in rows if row["group"] == "decode"}
    assert list(steps) == [decode.PLAIN, decode.SAME, decode.MOVING, decode.FLOOR]
    assert set(steps[decode.MOVING]["values"]) == {"us more than plain", "us more than the floor", "of repeated's p80"}
    assert all(0 < row["check"] < 1e-5 for name, row in steps.items() if name != decode.PLAIN)
    text = next(tmp_path.glob("speed_*.md")).read_text()
    assert "| dense formula |" in text
    assert "| not measured | none |" in text
    assert next(tmp_path.glob("speed_*.png")).stat().st_size > 1000
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["verdicts"] == record["verdicts"]


@pytest.mark.usefixtures("quick")
def test_a_variant_that_fails_is_a_row_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\n Tried to allocate 2.00 GiB")

    made = variants.variants

    def some_fail(at: Any) -> Any:
        return {n: v._replace(call=no_memory) if v.engine == "dense" else v for n, v in made(at).items()}

    monkeypatch.setattr(cli, "variants", some_fail)
    broken = ATTENTION._replace(engines=("nonsense",))
    rows = measured([ATTENTION, broken, ATTENTION._replace(length=96, engines=("cpu",))], tmp_path)["rows"]
    errors = {row["variant"]: row["error"] for row in rows if "error" in row}
    assert errors["dense formula"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert "nonsense" in errors["the whole case"]
    assert len(errors) == 2
    assert sum("ms" in row for row in rows) == 12
    assert "Tried to allocate" in next(tmp_path.glob("speed_*.md")).read_text()


@pytest.mark.usefixtures("quick")
def test_what_does_not_fit_in_the_time_is_named(tmp_path: Path) -> None:
    record = measured([ATTENTION, CASES[1]], tmp_path, "--minutes", "0.0001")
    assert record["rows"] == []
    assert record["dropped"] == [ATTENTION.name, CASES[1].name]
    text = next(tmp_path.glob("speed_*.md")).read_text()
    assert f"Dropped, not measured: {ATTENTION.name}; {CASES[1].name}." in text


def test_repetitions_go_before_cases() -> None:
    budget = cli.Budget(1, CPU)
    assert budget.share(4) == cli.MOST_SECONDS
    fewer = budget.share(20)
    assert fewer is not None
    assert cli.LEAST_SECONDS < fewer < 1.01
    assert budget.share(1000) == cli.LEAST_SECONDS
    budget.end -= 59
    assert budget.share(1) is None


@pytest.mark.parametrize("wrong", ["causal", "zeros", "mass of the next row", "gradients of plain causal"])
def test_the_check_rejects_what_is_not_stablemask(wrong: str) -> None:
    at = variants.setup(ATTENTION, CPU)
    inputs = timing.input_sets(2, 80, (2, 1), 16, torch.float32, CPU)[0]
    right = variants.variants(at)["cpu, StableMask"]
    plain = variants.variants(at)["cpu, plain"].call
    moved = at._replace(length=80, gammas={"headwise": at.gammas["headwise"]})
    later = stablemask(at.gammas["headwise"], length=80, positions=torch.arange(1, 81))

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if wrong == "causal":
            return plain(q, k, v)
        if wrong == "zeros":
            return right.call(q, k, v) * 0
        if wrong == "mass of the next row":
            return variants.flex_attention(q, k, v, score_mod=later, enable_gqa=True)
        causal = plain(q, k, v)
        return causal + (right.call(q, k, v) - causal).detach()

    assert error_of(right, at, inputs) < 1e-5
    with pytest.raises(ValueError, match="wrong: "):
        error_of(right._replace(call=call), moved, inputs)


def attention_row(length: int, ratio: float, **fields: Any) -> dict[str, Any]:
    case = Case("attention", ("flash",), length, 1)
    row = {"case": case.name, **case._asdict(), "variant": "flash, StableMask", "engine": "flash", "role": "StableMask"}
    both = {"same engine": {"forward+backward": {"median": ratio}}}
    return {**row, "gamma": "headwise", "ratio": both} | fields


def verdict_of(text: str, rows: list[dict[str, Any]]) -> targets.Verdict:
    (found,) = [verdict for verdict in targets.judge(rows, "cuda") if text in verdict.text]
    return found


def test_targets_are_met_missed_or_not_measured() -> None:
    long = "head-wise, S >= 4k"
    within = [attention_row(length, 1.005) for length in targets.LONG]
    assert verdict_of(long, within).verdict == targets.MET
    assert verdict_of(long, [*within[1:], attention_row(4096, 1.02)]).verdict == targets.MISSED
    assert "1.020 (flash, StableMask: causal, S 4096" in verdict_of(long, [*within[1:], attention_row(4096, 1.02)]).figure
    assert verdict_of(long, within[:3]).verdict == targets.PARTLY
    assert "not measured at S = 32768" in verdict_of(long, within[:3]).figure
    assert verdict_of(long, []) == targets.Verdict(verdict_of(long, []).text, 1.01, targets.NOT, "none")
    # Other rows do not count: another length, gamma, kind, or one that failed.
    others = [attention_row(2048, 9), attention_row(4096, 9, gamma="zero"), attention_row(4096, 9, kind="window")]
    assert verdict_of(long, [*within, *others]).verdict == targets.MET
    failed = {key: value for key, value in attention_row(4096, 9).items() if key != "ratio"} | {"error": "no"}
    assert verdict_of(long, [failed]).figure == "none; 1 failed"
    assert verdict_of(long, [failed, *within]).verdict == targets.PARTLY
    # A limit from below.
    fields = {"group": "epilogue", "gamma": "zero"}
    for share, verdict in ((0.86, targets.MET), (0.84, targets.MISSED)):
        row = attention_row(4096, 1, **fields, values={"of copy bandwidth": share})
        assert verdict_of("of the measured copy bandwidth", [row]).verdict == verdict


def test_every_target_names_cases_that_are_planned() -> None:
    """No target stays unmeasured because its filter fits nothing: a planned case fits, at every length."""
    for device, wanted, plan in (
        ("cuda", targets.ALL["cuda"], cases.gpu_plan()),
        ("cpu", targets.ALL["cpu"], cases.cpu_plan()),
    ):
        for target in wanted:
            assert target.device == device
            fields = {key: allowed for key, allowed in target.where.items() if key in Case._fields}
            fitting = [case for case in plan if all(getattr(case, key) in allowed for key, allowed in fields.items())]
            assert set(target.where.get("length", ())) <= {case.length for case in fitting}, target.text
            assert fitting, target.text


def test_the_plans_name_what_the_library_knows() -> None:
    for case in (*cases.gpu_plan(), *cases.cpu_plan()):
        known = (*cases.PAIRS, *cases.OURS_ALONE, *cases.BASELINES, *cases.PEERS)
        assert set(case.engines) <= set(known)
        assert case.heads % case.kv_heads == 0
        assert sum(cases.document_lengths(case)) == case.batch * case.length
        assert case.dtype in cases.DTYPES
        assert "flex FLASH" not in case.engines or not BEFORE_2_14
    assert set(cases.BACKEND_OF.values()) <= set(choose.BACKENDS)
    tokens = {case.batch * case.length for case in cases.gpu_plan() if case.group == "attention"}
    assert tokens == {cases.GPU_TOKENS}
    for plan in (cases.gpu_plan(), cases.cpu_plan()):
        names = [case.name for case in plan]
        assert len(set(names)) == len(names)


def test_what_takes_long_is_dropped_where_it_does_not_fit() -> None:
    budget = cli.Budget(1, CPU)
    assert budget.share(1, flop=59e12 * cli.FIRST_RATE["cpu"]) is not None
    assert budget.share(1, flop=61e12 * cli.FIRST_RATE["cpu"]) is None
    budget.spent(
        0.0, [{"tflops": {"forward": 9.0, "forward+backward": 2 * cli.FIRST_RATE["cpu"]}}, {"tflops": {"forward": 9.0}}, {}]
    )
    assert budget.share(1, flop=61e12 * cli.FIRST_RATE["cpu"]) is not None


def test_lines_of_a_panel_differ_and_hide_no_point() -> None:
    rows = [
        attention_row(n, 1 + i / 10, variant=f"{e}, StableMask", engine=e)
        for i, e in enumerate(("flash", "cudnn", "varlen", "flex"))
        for n in (2048, 4096)
    ]
    axes = figures.overview([*rows, attention_row(4096, 9.0, engine="flash", head_dim=64)], "cuda").axes[1]
    lines = [line for line in axes.lines if str(line.get_gid()) != "None"]
    assert [str(line.get_gid()) for line in lines] == ["cudnn", "flash", "flex", "varlen"]
    assert len({line.get_color() for line in lines}) == len({str(line.get_marker()) for line in lines}) == 4
    assert sorted(text.get_text() for text in axes.texts) == ["cudnn", "flash", "flex", "varlen"]
    assert all(points(line)[:, 0].tolist() == [2048, 4096] for line in lines)
    assert max(points(line)[:, 1].max() for line in lines) < 1.4, "another head layout is not in the line"


def test_flops_are_those_of_the_visible_pairs() -> None:
    case = Case("attention", ("flash",), 2048, 3, heads=5, head_dim=7)
    assert cases.flops(case, "forward") == 2 * 2 * 7 * 5 * 3 * 2048 * 2048 / 2
    assert cases.flops(case, "forward+backward") == 3.5 * cases.flops(case, "forward")
    i = torch.arange(2048)
    distance = i.unsqueeze(1) - i
    seen = int(((distance >= 0) & (distance < cases.WINDOW)).sum())
    assert cases.pairs(case._replace(kind="window", batch=1)) == pytest.approx(seen, rel=1e-3)
    assert cases.pairs(case._replace(kind="packed")) < cases.pairs(case._replace(length=3072, batch=2))


@pytest.mark.parametrize("kind", ["causal", "window", "packed", "alibi"])
def test_gpu_variants_are_built_without_a_gpu(kind: str) -> None:
    """Everything up to the call itself, block masks included, for each engine of the GPU's plan."""
    engines = dict.fromkeys(
        engine for case in cases.gpu_plan() if (case.group, case.kind) == ("attention", kind) for engine in case.engines
    )
    assert engines
    case = Case("attention", tuple(engines), 128, 2, kind, head_dim=16, heads=2, kv_heads=2)
    found = variants.variants(variants.setup(case, CPU))
    assert set(engines) == {variant.engine for variant in found.values()}
    for engine in set(engines) & set(cases.PAIRS):
        roles = [variant.role for variant in found.values() if variant.engine == engine]
        assert roles[:2] == [variants.PLAIN, variants.STABLEMASK]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--minutes", "0"], "--minutes must be above 0 and at most a day, got 0.0"),
        (["--minutes", "nan"], "--minutes must be above 0 and at most a day, got nan"),
        (["--only", "sleep"], "invalid choice: 'sleep'"),
        (["--out", __file__], "is not a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(options)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert why in printed.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a CUDA device")
def test_a_gpu_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--device", "cuda", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


@pytest.mark.card("the speed of a GPU")
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["causal", "window", "packed", "alibi", "epilogue", "decode"])
def test_every_engine_of_a_gpu_at_its_smallest(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "MOST_SECONDS", 0.0)
    group = kind if kind in ("epilogue", "decode") else "attention"
    planned = [c for c in cases.gpu_plan() if c.group == group and not c.impl and (group != "attention" or c.kind == kind)]
    engines = tuple(dict.fromkeys(engine for case in planned for engine in case.engines))
    case = planned[0]._replace(engines=engines, length=256, batch=2, heads=2, kv_heads=2, head_dim=64)
    cli.main(["--device", "cuda", "--out", str(tmp_path)], [case])
    rows = json.loads(next(tmp_path.glob("speed_*.json")).read_text())["rows"]
    assert [row["error"] for row in rows if "error" in row] == []
    assert all("ms" in row for row in rows)
