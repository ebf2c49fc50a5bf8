"""What it takes to know that an attention is StableMask: the oracle, the laws, the judge of low precision, the check.

    from sm_flex.testing import check_attention, oracle
    out, lse = oracle(q, k, v, gamma=0.5)  # eq. 11 in float64
    check_attention(my_attention)  # every law, on requests drawn by hypothesis; answer.py says how it is called

    python -m sm_flex.testing my_module:my_attention

It imports with torch alone; drawing requests (check_attention, sm_flex.testing.strategies) needs hypothesis:
pip install 'sm-flex[test]'.
"""

from sm_flex.testing import laws
from sm_flex.testing.conformance import NotStableMask, Report, Result, check_attention
from sm_flex.testing.judge import assert_as_good_as, error_budget
from sm_flex.testing.oracle import oracle
from sm_flex.testing.request import Request

__all__ = [
    "NotStableMask",
    "Report",
    "Request",
    "Result",
    "assert_as_good_as",
    "check_attention",
    "error_budget",
    "laws",
    "oracle",
]
