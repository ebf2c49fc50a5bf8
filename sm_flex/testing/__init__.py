"""What it takes to know that an attention is StableMask: the oracle, the laws, the tolerance of low precision, the check.

    from sm_flex.testing import check_attention, oracle
    out, lse = oracle(q, k, v, gamma=0.5)  # eq. 11 in float64
    check_attention(my_attention)  # every law, on problems drawn by hypothesis; contract.py says how it is called

    python -m sm_flex.testing my_module:my_attention

It imports with torch alone; drawing problems (check_attention, sm_flex.testing.strategies) needs hypothesis:
pip install 'sm-flex[testing]'.
"""

from typing import Any

from sm_flex.testing import laws
from sm_flex.testing.conformance import NotStableMask, Report, Result, check_attention
from sm_flex.testing.gradients import assert_matches_eq11
from sm_flex.testing.old_names import find
from sm_flex.testing.oracle import oracle
from sm_flex.testing.problem import Problem
from sm_flex.testing.tolerance import assert_within_error_budget, error_budget

__all__ = [
    "NotStableMask",
    "Problem",
    "Report",
    "Result",
    "assert_matches_eq11",
    "assert_within_error_budget",
    "check_attention",
    "error_budget",
    "laws",
    "oracle",
]


def __getattr__(name: str) -> Any:
    return find(name, {"Request": Problem, "assert_as_good_as": assert_within_error_budget}, __name__)
