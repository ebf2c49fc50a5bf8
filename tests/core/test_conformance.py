"""check_attention has teeth: planted errors are caught, each by the law it breaks, and the reported code reproduces them."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from torch import Tensor

from sm_flex.testing import Report, check_attention
from sm_flex.testing.__main__ import main
from sm_flex.testing.conformance import Result, plan, refusals, search
from tests.helpers.planted_errors import attention, with_error

ROOT = Path(__file__).parents[2]


VALUE_LAWS = ("sink_value", "a_sink_with_a_value_is_a_key", "gradient_of_sink_value")
SINK_LAWS = (
    "sink",
    "sink_value",
    "a_sink_is_a_key_without_value",
    "a_sink_with_a_value_is_a_key",
    "a_constant_moves_lse_alone",
    "gradient_of_sink",
    "gradient_of_sink_value",
)
# Each error, a law that it breaks, and one that it leaves whole.
ERRORS = {
    "mass off by one row": ("equation_11", "infinite_gamma_is_causal_attention"),
    "gamma of the wrong head under GQA": ("grouped_heads", "equation_11"),
    "mass that follows the cache length": ("a_prefix_has_a_prefix", "no_row_sees_the_future"),
    "future leak of one key": ("no_row_sees_the_future", "linear_in_v"),
    "dropped lse gradient": ("gradient_of_lse", "gradients"),
    "lse cast to bf16": ("log_sum_exp", "equation_11"),
    "lse cast to bf16 before the share": ("log_sum_exp", "no_row_sees_the_future"),
    "lse returned in bf16": ("log_sum_exp", ""),
    "packed positions not restarting": ("packed_is_one_by_one", "positions"),
    "out scaled but lse not": ("rows_sum_to_the_real_share", "equation_11"),
    "forgotten sink": ("sink", "equation_11"),
    "sink of the wrong head": ("batch_and_heads_are_independent", "infinite_gamma_is_causal_attention"),
    "sink in bf16": ("a_constant_moves_lse_alone", "infinite_gamma_is_causal_attention"),
    "sink added after the remask": ("a_sink_is_a_key_without_value", "log_sum_exp"),
    "lse without the sink": ("a_sink_is_a_key_without_value", "sink"),
    "sink without a gradient": ("gradient_of_sink", "sink"),
    "value of the sink forgotten": ("sink_value", "a_sink_is_a_key_without_value"),
    "value of the wrong head": ("batch_and_heads_are_independent", "a_sink_is_a_key_without_value"),
    "share of the sink from what is not real": ("sink_value", "a_sink_with_a_value_is_a_key"),
    "share of the sink from the lse of the real scores": ("a_sink_with_a_value_is_a_key", "log_sum_exp"),
    "share of the sink without a gradient": ("gradient_of_sink_value", "sink_value"),
    "value without a gradient": ("gradient_of_sink_value", "sink_value"),
    "zeros": ("equation_11", "log_sum_exp"),
    "plain causal attention": ("equation_11", "infinite_gamma_is_causal_attention"),
}


def outcome(fn: Any, law: str, dtype: torch.dtype = torch.float32, max_examples: int = 20) -> Result:
    """What check_attention finds for one law."""
    steps = {step[0]: step for step in plan(fn, grads=True, dtype=dtype, device="cpu")}
    name, check, problems, why_not = steps[law]
    return Result(name, "not run", why=why_not) if why_not else search(name, check, fn, problems, max_examples)


@pytest.fixture
def no_shrinking() -> Iterator[None]:
    """For a test that asks whether a problem breaks a law and not for the smallest one, which is most of the work."""
    settings.register_profile("before", settings.default)
    settings.register_profile("no shrinking", settings.default, phases=[Phase.explicit, Phase.generate])
    settings.load_profile("no shrinking")
    yield
    settings.load_profile("before")


def test_without_an_error_nothing_is_caught():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        report = check_attention(attention, dtype=dtype, max_examples=5)
        assert report.failed == report.not_run == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", ERRORS)
def test_planted_error_is_caught(error: str, dtype: torch.dtype, no_shrinking: None):
    broken, whole = ERRORS[error]
    assert outcome(with_error(error), broken, dtype).status == "failed"
    assert not whole or outcome(with_error(error), whole, dtype).status == "passed"


@pytest.mark.parametrize("law", ["equation_11", "a_prefix_has_a_prefix"])
def test_the_code_of_a_report_reproduces_the_failure(law: str):
    error = "mass that follows the cache length"
    result = outcome(with_error(error), law)
    assert result.code in str(Report("fn", (result,)))
    with pytest.raises(AssertionError, match="out: error"):
        exec(result.code, {"fn": with_error(error)})
    exec(result.code, {"fn": attention})  # and passes without the error


def test_the_smallest_problem_is_small():
    """Two rows, the least that one of which can see the other's future: everything else is at its default."""
    problem = outcome(with_error("future leak of one key"), "no_row_sees_the_future").problem
    assert problem is not None
    assert (problem.batch, problem.heads, problem.num_queries, problem.num_keys, problem.head_dim) == (1, 1, 2, 2, 1)


def test_what_fn_refuses_is_not_run_and_never_passed():
    def narrow(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if options["visible"] is not None or options["positions"] is not None:
            raise NotImplementedError("masks and positions are not served")
        if options["gamma"].requires_grad:
            raise NotImplementedError("gamma is not learned")
        return attention(q, k, v, **options)[0]

    report = check_attention(narrow, max_examples=5)
    why = {result.law: result.why for result in report.results if result.status == "not run"}
    assert why == {
        "positions": "fn refuses positions: masks and positions are not served",
        "masks": "fn refuses visible: masks and positions are not served",
        "sink": "fn refuses sink: its signature does not name it",
        "sink_value": "fn refuses sink_value: its signature does not name it",
        "a_sink_is_a_key_without_value": "fn refuses sink: its signature does not name it",
        "a_sink_with_a_value_is_a_key": "fn refuses sink_value: its signature does not name it",
        "a_constant_moves_lse_alone": "fn refuses sink: its signature does not name it",
        "log_sum_exp": "fn returns no lse",
        "cached_steps_are_the_full_pass": "fn refuses positions: masks and positions are not served",
        "packed_is_one_by_one": "fn refuses positions: masks and positions are not served",
        "padding_changes_nothing": "fn refuses positions: masks and positions are not served",
        "gradient_of_gamma": "gamma is not learned",
        "gradient_of_sink": "fn refuses sink: its signature does not name it",
        "gradient_of_sink_value": "fn refuses sink_value: its signature does not name it",
        "gradient_of_lse": "fn returns no lse",
    }
    assert not set(why) & set(report.passed)


def test_a_fn_of_another_signature_is_refused_at_once(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match=r"must take \(q, k, v, \*, gamma, length, positions, visible, scale\)"):
        check_attention(lambda q, k, v: q)
    with pytest.raises(SystemExit) as stop:
        main(["sm_flex:stablemask"])
    assert (stop.value.code, "must take (q, k, v" in capsys.readouterr().err) == (2, True)


def test_a_fn_that_swallows_keywords_is_given_no_sink():
    """As one written before there were sinks; no law can then fail on a sink that it never saw."""
    seen = []

    def swallows(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append("sink" in options)
        return attention(q, k, v, **options)

    assert check_attention(swallows, max_examples=1).not_run == SINK_LAWS
    assert seen
    assert not any(seen)


def test_a_fn_that_names_a_sink_alone_is_given_no_value():
    seen = []

    def without_value(q: Tensor, k: Tensor, v: Tensor, *, sink: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append("sink_value" in options)
        return attention(q, k, v, sink=sink, **options)

    assert check_attention(without_value, max_examples=1).not_run == VALUE_LAWS
    assert seen
    assert not any(seen)


def test_a_fn_that_refuses_everything_passes_nothing():
    def refuses(*args: Any, **options: Any) -> Tensor:
        raise NotImplementedError("no")

    assert check_attention(refuses, max_examples=2).passed == ()


def test_inference_kernels(no_shrinking: None):
    @torch.no_grad()
    def inference(q: Tensor, k: Tensor, v: Tensor, *, sink: Any = None, sink_value: Any = None, **options: Any) -> Any:
        return attention(q, k, v, sink=sink, sink_value=sink_value, **options)

    report = check_attention(inference, grads=False, max_examples=3)
    gradients = ("gradients", "gradient_of_gamma", "gradient_of_sink", "gradient_of_sink_value", "gradient_of_lse")
    assert report.not_run == gradients
    assert "does not require grad" in outcome(inference, "gradients", max_examples=3).why


def test_a_refusal_in_the_backward_is_not_run():
    class NoLseGrad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, lse: Tensor) -> Tensor:
            ctx.set_materialize_grads(False)
            return lse.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
            if grads[0] is not None:
                raise NotImplementedError("lse has no gradient")
            return None

    def fn(q: Tensor, k: Tensor, v: Tensor, *, sink: Any = None, sink_value: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = attention(q, k, v, sink=sink, sink_value=sink_value, **options)
        return out, NoLseGrad.apply(lse)  # pyright: ignore[reportReturnType]

    assert check_attention(fn, max_examples=3).not_run == ("gradient_of_lse",)


def test_an_exception_is_a_failure_and_not_a_refusal(no_shrinking: None):
    def fn(
        q: Tensor, k: Tensor, v: Tensor, *, gamma: Any, length: int, visible: Any, sink: Any = None, sink_value: Any = None
    ) -> Any:
        return q

    assert refusals(fn, torch.float32, "cpu") == {}
    assert "TypeError" in outcome(fn, "equation_11", max_examples=2).why


def test_a_fn_that_fails_now_and_then_is_a_failure():
    calls = []

    def fn(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(0)
        return attention(q, k, v, **options, error="zeros" if len(calls) % 50 == 40 else "")

    assert "fn is not deterministic" in outcome(fn, "equation_11", max_examples=100).why


def planted(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, **options, error="out scaled but lse not")


def test_shell(capsys: pytest.CaptureFixture[str]):
    assert main([f"{__name__}:attention", "--max-examples", "2", "--no-grads"]) == 0
    assert "attention, float32 on cpu: 21 laws passed, 0 failed, 5 not run" in capsys.readouterr().out
    assert main([f"{__name__}:planted", "--max-examples", "5", "--no-grads"]) == 1
    out = capsys.readouterr().out
    code = out.split("breaks log_sum_exp:\n\n")[1].split("\n\nThe smallest")[0]
    assert f"from {__name__} import planted" in code
    with pytest.raises(AssertionError, match="lse: error"):
        exec(code, {})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere:fn"], "cannot import nowhere: ModuleNotFoundError"),
        (["math:fn"], "math has no fn"),
        (["math:pi"], "math:pi is not callable, but float"),
        (["math"], "expected module:function, got 'math'"),
        (["math:sqrt", "--max-examples", "0"], "--max-examples must be at least 1, got 0"),
        (["math:sqrt", "--device", "nowhere"], "--device nowhere: "),
        (["math:sqrt", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_without_hypothesis_the_package_imports_and_says_what_is_missing():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import sm_flex.testing as t\n"
        "try: t.check_attention(lambda *a, **k: None)\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "problems are drawn by hypothesis: pip install 'sm-flex[testing]'"
