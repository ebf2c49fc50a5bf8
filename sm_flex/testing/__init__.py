"""What it takes to know that an attention is StableMask: the oracle (eq. 11 in float64) and the judge of low precision.

    from sm_flex.testing import oracle
    out, lse = oracle(q, k, v, gamma=0.5)

This package needs nothing but torch; ``sm_flex.testing.strategies`` draws requests with hypothesis.
"""

from sm_flex.testing.judge import assert_as_good_as, error_budget
from sm_flex.testing.oracle import oracle

__all__ = ["assert_as_good_as", "error_budget", "oracle"]
