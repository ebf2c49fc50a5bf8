"""--attn, --gamma and --switch_attn: read before the launched script's own parser sees the command line."""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from sm_flex import gamma_from

ATTENTIONS = ("causal", "stablemask")


class BadInput(Exception):
    """Something that the user must change, in one line."""


class Flags(NamedTuple):
    """The attention asked for: gamma is "headwise" or numbers with commas between; switch takes any checkpoint."""

    attn: str
    gamma: str
    switch: bool

    @property
    def name(self) -> str:
        """What a checkpoint remembers: flags of one name are one attention."""
        return self.attn if self.attn == "causal" else f"{self.attn} with gamma {self.gamma}"

    def gamma_for(self, num_heads: int) -> Tensor:
        """gamma as stablemask() takes it: float32, 0-d for a single number, else (H,).

        Raises:
            BadInput: the list of numbers is not one for each head.
        """
        try:
            return gamma_from(spec_of(self.gamma), num_heads, name="--gamma").float()
        except ValueError as error:
            raise BadInput(str(error)) from None

    def check(self, trained: str) -> None:
        """A checkpoint's attention against this one.

        Raises:
            BadInput: they differ, and --switch_attn was not given.
        """
        if trained != self.name and not self.switch:
            raise BadInput(f"the checkpoint was trained with {trained}, not {self.name}: to use it so, add --switch_attn")


def parse_flags(argv: Sequence[str], usage: str = "") -> tuple[Flags, list[str]]:
    """Our flags, and the rest of the command line in its order. --help prints usage and leaves; else the attention is printed.

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
    flags = Flags(attn, canonical_gamma("headwise" if gamma is None else gamma), switch)
    if attn == "stablemask" and _is_first_process():  # causal is the script as it is, to the letter
        print(f"attention: {flags.name}")
    return flags, rest


def canonical_gamma(gamma: str, flag: str = "--gamma") -> str:
    """One spelling for one gamma, headwise or numbers with commas between: 0.50 and .5 are 0.5.

    Raises:
        BadInput: naming the flag.
    """
    if gamma == "headwise":
        return gamma
    try:
        numbers = [float(word) for word in gamma.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(x >= 0 for x in numbers):  # NaN too
        raise BadInput(f"{flag} must be headwise, a number >= 0, or one for each head with commas between, got {gamma!r}")
    return ",".join(f"{x:g}" if float(f"{x:g}") == x else repr(x) for x in numbers)


def spec_of(gamma: str) -> str | float | list[float]:
    """A canonical gamma as gamma_from, or a config, takes it."""
    if gamma == "headwise":
        return gamma
    numbers = [float(word) for word in gamma.split(",")]
    return numbers if len(numbers) > 1 else numbers[0]


@contextmanager
def exit_on_bad_input(prog: str) -> Iterator[None]:
    """A BadInput ends the program with exit code 2 and one line on stderr; of several processes the first says it."""
    try:
        yield
    except BadInput as error:
        if _is_first_process():
            print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
