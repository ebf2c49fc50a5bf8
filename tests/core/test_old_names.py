"""The old names of sm_flex.testing, which are kept for one release: each warns and is the new one."""

from collections.abc import Callable
from typing import Any

import pytest

import sm_flex.testing as kit
from sm_flex.testing import strategies

PROBLEM = kit.Problem(heads=2, gamma=0.5)
RESULT = kit.Result("equation_11", "failed", problems=3, problem=PROBLEM)


@pytest.mark.parametrize(
    ("old", "message", "new"),
    [
        (lambda: kit.Request, "Request is now Problem", kit.Problem),
        (lambda: kit.assert_as_good_as, "assert_as_good_as is now", kit.assert_within_error_budget),
        (lambda: strategies.requests, "requests is now problems", strategies.problems),
        (lambda: PROBLEM.but(heads=3), "but is now replace", PROBLEM.replace(heads=3)),
        (lambda: PROBLEM.rates.tolist(), "rates is now gamma_H", [0.5, 0.5]),
        (lambda: RESULT.request, "request is now problem", PROBLEM),
        (lambda: RESULT.requests, "requests is now problems", 3),
    ],
)
def test_old_names(old: Callable[[], Any], message: str, new: Any):
    with pytest.warns(DeprecationWarning, match=message):
        assert old() == new


def test_a_counterexample_that_was_printed_under_the_old_names_still_runs():
    code = "from sm_flex.testing import Request, laws\nrequest = Request(gamma=0.1, length=3)\nlaws.equation_11(fn, request)"
    with pytest.warns(DeprecationWarning, match="Request"), pytest.raises(AssertionError, match="out: error"):
        exec(code, {"fn": lambda q, k, v, **arguments: q * 0})


def test_no_other_name_is_there():
    with pytest.raises(AttributeError, match="no attribute 'judge'"):
        kit.judge  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
