"""check_attention: is this function StableMask? Every law, on problems that hypothesis draws and shrinks.

    from sm_flex.testing import check_attention
    print(check_attention(my_attention))  # raises NotStableMask where a law fails

contract.py says how my_attention is called. A law that it cannot express is not run, and is listed as that.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sm_flex.testing.contract import Attention
from sm_flex.testing.law import Check
from sm_flex.testing.laws import LAWS
from sm_flex.testing.old_names import renamed
from sm_flex.testing.problem import Problem

# Large and regular, for kernels that want that: which FEATURES of a problem does fn refuse?
PROBE = Problem(batch=2, heads=4, kv_heads=4, num_queries=128, num_keys=128, head_dim=64, length=256)
PROBES: dict[str, dict[str, Any]] = {
    "grouped": {"kv_heads": 2},
    "positions": {"starts": (0,)},
    "visible": {"window": 64},
    "scale": {"scale": 0.5},
    "sink": {"sink": 0.0},
    "sink_value": {"sink": 0.0, "sink_values": 4},
}
# Features that have keywords of their own, which are passed only to a function that names them.
NAMED = {"sink": ("sink",), "sink_value": ("sink", "sink_value")}


@dataclass(frozen=True)
class Result:
    """What became of one law: how many problems it held for, how many fn refused, why it failed or was not run."""

    law: str
    status: Literal["passed", "failed", "not run"]
    problems: int = 0
    refused: int = 0
    why: str = ""
    problem: Problem | None = None
    code: str = ""

    request, requests = renamed("request", "problem"), renamed("requests", "problems")

    def __str__(self) -> str:
        count = f"{self.problems} problems" + (f", {self.refused} more refused by fn" if self.refused else "")
        return f"{self.status:8} {self.law:38} {count if self.status == 'passed' else self.why}"


@dataclass(frozen=True)
class Report:
    """The laws that an attention was checked against, each in passed, failed or not_run; str() is for people."""

    name: str
    results: tuple[Result, ...]

    @property
    def passed(self) -> tuple[str, ...]:
        return self._of("passed")

    @property
    def failed(self) -> tuple[str, ...]:
        return self._of("failed")

    @property
    def not_run(self) -> tuple[str, ...]:
        return self._of("not run")

    def _of(self, status: str) -> tuple[str, ...]:
        return tuple(result.law for result in self.results if result.status == status)

    @property
    def headline(self) -> str:
        return f"{self.name}: {len(self.passed)} laws passed, {len(self.failed)} failed, {len(self.not_run)} not run"

    @property
    def counterexamples(self) -> str:
        """For each law that failed, the smallest problem found that breaks it, as code."""
        broken = (result for result in self.results if result.status == "failed")
        return "".join(f"\nThe smallest problem found that breaks {x.law}:\n\n{x.code}\n" for x in broken)

    def __str__(self) -> str:
        return "\n".join([self.headline, *map(str, self.results), self.counterexamples]).rstrip()


class NotStableMask(AssertionError):
    """A law failed; ``report`` says which, and with what problem."""

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report


def check_attention(
    fn: Attention,
    *,
    grads: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    max_examples: int = 50,
) -> Report:
    """Run every law of StableMask (sm_flex.testing.laws.LAWS) against fn.

    Args:
        fn: fn(q, k, v, *, gamma, length, positions, visible, scale) -> out or (out, lse), as sm_flex/testing/contract.py says.
            What it does not do it refuses with NotImplementedError; those laws are not run, nor are those about sinks
            where its signature has no `sink`, or no `sink_value`.
        grads: also its gradients (False: an inference kernel).
        dtype: of q, k and v. float64 is held to 1e-10, others to the budget of sm_flex/testing/tolerance.py.
        device: where the problems are, and the oracle runs: one that has float64.
        max_examples: problems per law. The same call draws the same problems.

    Returns:
        The Report, if no law failed.

    Raises:
        ValueError: fn cannot be called like that.
        NotStableMask: an AssertionError, whose message is the report with the smallest failing problem of each law as code.
        ModuleNotFoundError: hypothesis is not installed (pip install 'sm-flex[testing]').
    """
    results = tuple(each_law(fn, grads=grads, dtype=dtype, device=device, max_examples=max_examples))
    report = Report(f"{name_of(fn)}, {str(dtype).removeprefix('torch.')} on {device}", results)
    if report.failed:
        raise NotStableMask(report)
    return report


def each_law(
    fn: Attention, *, grads: bool, dtype: torch.dtype, device: str, max_examples: int, seed: int = 0
) -> Iterator[Result]:
    """The result of each law, as soon as it is known."""
    check_signature(fn)
    for name, law, problems, why_not in plan(fn, grads=grads, dtype=dtype, device=device):
        yield Result(name, "not run", why=why_not) if why_not else search(name, law, fn, problems, max_examples, seed)


def plan(fn: Attention, *, grads: bool, dtype: torch.dtype, device: str) -> list[tuple[str, Check, Any, str]]:
    """Each law with the problems to draw for it, of what fn does not refuse, or why it cannot be run."""
    from sm_flex.testing.strategies import problems

    refused, steps = refusals(fn, dtype, device), []
    for name, law in LAWS.items():
        missing = [f"fn refuses {feature}: {refused[feature]}" for feature in law.needs if feature in refused]
        if law.gradient and not grads:
            missing = ["grads=False"]
        drawn = problems(
            takes=[feature for feature in law.takes if feature not in refused],
            needs=[] if missing else law.needs,
            finite_gamma=law.finite_gamma,
            dtype=dtype,
            device=device,
        )
        steps.append((name, law.check, drawn, missing[0] if missing else ""))
    return steps


def check_signature(fn: Attention) -> None:
    """Raises ValueError where fn cannot be called as contract.py says: every law would fail by that alone."""
    try:
        signature = inspect.signature(fn)
    except ValueError:  # a builtin without one
        return
    try:
        signature.bind("q", "k", "v", **dict.fromkeys(("gamma", "length", "positions", "visible", "scale")))
    except TypeError as error:
        raise ValueError(
            f"{name_of(fn)}{signature} must take (q, k, v, *, gamma, length, positions, visible, scale): {error}"
        ) from error


def refusals(fn: Attention, dtype: torch.dtype, device: str) -> dict[str, str]:
    """The FEATURES that fn refuses, each with its reason. A fn that refuses the plain problem too refuses something else."""
    found: dict[str, str] = {}
    for feature, changes in {"": {}, **PROBES}.items():
        if not _names(fn, feature):
            found[feature] = "its signature does not name it"
            continue
        arguments = PROBE.replace(**changes, dtype=dtype, device=device).arguments
        q, k, v = (arguments.pop(name) for name in "qkv")
        try:
            fn(q, k, v, **arguments)
        except NotImplementedError as error:
            if not feature:
                return {name: "its signature does not name it" for name in NAMED if not _names(fn, name)}
            found[feature] = _line(error)
        except Exception:
            continue  # not a refusal: the law that is about it fails with it
    return found


def _names(fn: Attention, feature: str) -> bool:
    """An fn written before there were sinks may swallow unknown keywords: **kwargs alone does not count."""
    try:
        return all(name in inspect.signature(fn).parameters for name in NAMED.get(feature, ()))
    except ValueError:  # a builtin without a signature
        return False


def search(name: str, law: Check, fn: Attention, problems: Any, max_examples: int, seed: int = 0) -> Result:
    """The law on problems drawn from a strategy: passed, not run where fn refused all, or failed with the smallest found."""
    import hypothesis

    ran, refusals, failure = 0, [], []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
        report_multiple_bugs=False,
    )
    @hypothesis.given(problems)
    def hold(problem: Problem) -> None:
        nonlocal ran
        try:
            law(fn, problem)
        except NotImplementedError as error:
            refusals.append(_line(error))
        except Exception as error:
            failure[:] = [problem, error]
            raise
        else:
            ran += 1

    try:
        hold()
    except Exception as error:  # hypothesis' own, for a fn that fails now and then, or the last failure
        if not failure:
            raise
        problem, cause = failure
        note = "" if error is cause else "; not on every call: fn is not deterministic"
        why = _line(cause) + note
        return Result(name, "failed", ran, len(refusals), why, problem, as_code(name, fn, problem, why))
    if not ran:
        return Result(name, "not run", 0, len(refusals), refusals[0] if refusals else "no problem was drawn")
    return Result(name, "passed", ran, len(refusals))


def as_code(law: str, fn: Attention, problem: Problem, why: str) -> str:
    """A program that checks the one law on the one problem."""
    module, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", "")
    importable = module not in (None, "__main__") and name.isidentifier()
    fn_name = name if importable else "fn"
    lines = [
        "from math import inf" if "inf" in repr(problem) else "",
        "import torch",
        "from sm_flex.testing import Problem, laws",
        f"from {module} import {name}" if importable else "# fn is the function under test",
        "",
        f"problem = {problem!r}",
        f"laws.{law}({fn_name}, problem)  # {why}",
    ]
    return "\n".join(line for i, line in enumerate(lines) if line or i)


def name_of(fn: Attention) -> str:
    return getattr(fn, "__qualname__", None) or repr(fn)


def _line(error: Exception) -> str:
    """The first line of what it says, with its kind where that says more."""
    lines = str(error).splitlines() or [""]
    return lines[0] if type(error) in (AssertionError, NotImplementedError) else f"{type(error).__name__}: {lines[0]}"
