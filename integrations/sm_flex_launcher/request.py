"""--attn, --gamma and --switch_attn: read before the launched script's own parser sees the command line."""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from sm_flex import headwise_gamma

ATTENTIONS = ("causal", "stablemask")


class BadInput(Exception):
    """Something that the user must change, in one line."""


class Request(NamedTuple):
    """The attention asked for: gamma is "headwise" or numbers with commas between; switch takes any checkpoint."""

    attn: str
    gamma: str
    switch: bool

    @property
    def name(self) -> str:
        """What a checkpoint remembers; two requests of one name are one attention."""
        return self.attn if self.attn == "causal" else f"{self.attn} with gamma {self.gamma}"

    def rates(self, num_heads: int) -> Tensor:
        """gamma as stablemask() takes it: float32, 0-d for a single number, else (H,).

        Raises:
            BadInput: the list of numbers is not one for each head.
        """
        if self.gamma == "headwise":
            return headwise_gamma(num_heads)
        rates = [float(rate) for rate in self.gamma.split(",")]
        if len(rates) == 1:
            return torch.tensor(rates[0])
        if len(rates) != num_heads:
            raise BadInput(f"--gamma must have one number for each of the {num_heads} heads, got {len(rates)}: {self.gamma}")
        return torch.tensor(rates)

    def check(self, trained: str) -> None:
        """A checkpoint's attention against this one.

        Raises:
            BadInput: they differ, and --switch_attn was not given.
        """
        if trained != self.name and not self.switch:
            raise BadInput(f"the checkpoint was trained with {trained}, not {self.name}: to use it so, add --switch_attn")


def take_request(argv: Sequence[str], usage: str = "") -> tuple[Request, list[str]]:
    """Our flags, and the rest of the command line in its order. --help prints usage and leaves; else the request is printed.

    Raises:
        BadInput: a flag is missing, unknown or does not parse.
    """
    if "--help" in argv or "-h" in argv:
        print(usage.strip())
        raise SystemExit(0)
    values: dict[str, str] = {}
    rest = []
    switch = False
    for arg in argv:
        flag, equals, value = arg.partition("=")
        if flag in ("--attn", "--gamma"):
            if not equals:
                raise BadInput(f"{flag} takes its value after an equals sign, as in --attn=stablemask --gamma=headwise")
            values[flag] = value
        elif flag == "--switch_attn":
            if value not in ("", "True", "False"):
                raise BadInput(f"--switch_attn is given as it is, or as True or False, got {arg}")
            switch = value != "False"
        else:
            rest.append(arg)
    attn, gamma = values.get("--attn"), values.get("--gamma")
    if attn not in ATTENTIONS:
        raise BadInput(f"--attn must be given as {' or '.join(ATTENTIONS)}, got {attn or 'nothing'}")
    if attn == "causal" and gamma is not None:
        raise BadInput(f"--gamma belongs to --attn=stablemask, got --attn=causal --gamma={gamma}")
    request = Request(attn, normal_gamma("headwise" if gamma is None else gamma), switch)
    if attn == "stablemask" and _is_first_process():  # causal is the script as it is, to the letter
        print(f"attention: {request.name}")
    return request, rest


def normal_gamma(gamma: str, flag: str = "--gamma") -> str:
    """One spelling for one gamma, headwise or numbers with commas between: 0.50 and .5 are 0.5.

    Raises:
        BadInput: naming the flag.
    """
    if gamma == "headwise":
        return gamma
    try:
        rates = [float(rate) for rate in gamma.split(",")]
    except ValueError:
        rates = [math.nan]
    if not all(rate >= 0 for rate in rates):  # NaN too
        raise BadInput(f"{flag} must be headwise, a number >= 0, or one for each head with commas between, got {gamma!r}")
    return ",".join(f"{rate:g}" if float(f"{rate:g}") == rate else repr(rate) for rate in rates)


@contextmanager
def one_line(prog: str) -> Iterator[None]:
    """A BadInput ends the program with exit code 2 and one line on stderr; of several processes the first says it."""
    try:
        yield
    except BadInput as error:
        if _is_first_process():
            print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
