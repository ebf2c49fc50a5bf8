"""gamma and length as a config writes them."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from sm_flex import gamma_from, headwise_gamma, length_from

NAME = 'config.stablemask["gamma"]'


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("headwise", headwise_gamma(3).double()),
        (0.5, torch.tensor(0.5).double()),
        (1, torch.tensor(1.0).double()),
        (0, torch.tensor(0.0).double()),
        (0.1, torch.tensor(0.1, dtype=torch.float64)),
        (math.inf, torch.tensor(math.inf).double()),
        (2**80, torch.tensor(2.0**80).double()),
        ([0.5, 0, math.inf], torch.tensor([0.5, 0.0, math.inf]).double()),
        ((0.1, 1, 2), torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)),
    ],
)
def test_what_a_config_may_say(spec: Any, expected: Tensor):
    gamma = gamma_from(spec, 3)
    assert gamma.dtype == torch.float64
    torch.testing.assert_close(gamma, expected, rtol=0, atol=0)


def test_a_list_of_one_is_one_per_head():
    assert gamma_from([0.5], 1).shape == (1,)
    assert gamma_from(0.5, 1).shape == ()


@pytest.mark.parametrize(
    ("spec", "error", "why"),
    [
        ("steep", TypeError, "must be \"headwise\", a number or a list of numbers, got 'steep'"),
        (None, TypeError, "must be .*, got None"),
        (True, TypeError, "must be .*, got True"),
        ([0.5, None, 0.1], TypeError, r"must be .*, got \[0.5, None, 0.1\]"),
        ([0.5, False, 0.1], TypeError, r"must be .*, got \[0.5, False, 0.1\]"),
        (["0.5"] * 3, TypeError, "must be .*, got"),
        ({"headwise": 1}, TypeError, "must be .*, got"),
        (torch.rand(3), TypeError, "must be .*, got tensor"),
        (-1, ValueError, r"must be >= 0 \(inf is plain causal attention\), got -1"),
        (math.nan, ValueError, "must be >= 0 .*, got nan"),
        ([0.1, -0.1, 0.1], ValueError, "must be >= 0"),
        ([0.1, 0.2], ValueError, r"must have one number for each of the model's 3 query heads, got 2: \[0.1, 0.2\]"),
        ([], ValueError, "must have one number for each of the model's 3 query heads, got 0"),
        (10**400, ValueError, "must be a float64 or inf, got an int beyond float64"),
    ],
)
def test_what_it_may_not_say(spec: Any, error: type[Exception], why: str):
    for name in ("gamma", NAME):
        with pytest.raises(error, match=f"^{re.escape(name)} {why}"):
            gamma_from(spec, 3, name=name)


@pytest.mark.parametrize(
    ("spec", "error", "why"),
    [
        (0, ValueError, "N must be at least 1, got 0"),
        (-7, ValueError, "N must be at least 1, got -7"),
        (2.5, TypeError, "N must be an int, the training length, got 2.5"),
        (True, TypeError, "N must be an int, the training length, got True"),
        ("2k", TypeError, "N must be an int, the training length, got '2k'"),
        (None, TypeError, "N must be an int, the training length, got None"),
    ],
)
def test_length(spec: Any, error: type[Exception], why: str):
    assert length_from(2048) == 2048
    with pytest.raises(error, match=why):
        length_from(spec, name="N")


@pytest.mark.parametrize("spec", ["headwise", 0.5, [0.5, 0.25]])
def test_gamma_is_on_the_cpu_whatever_the_default_device(spec: Any):
    """Transformers builds a model under torch.device("meta") before it loads its weights."""
    with torch.device("meta"):
        gamma = gamma_from(spec, 2)
    assert gamma.device.type == "cpu"
    assert torch.equal(gamma, gamma_from(spec, 2))
