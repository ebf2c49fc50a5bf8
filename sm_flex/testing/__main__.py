"""Is this function StableMask? From the shell.

    python -m sm_flex.testing my_module:my_attention [--max-examples N] [--dtype bfloat16] [--device cuda] [--no-grads]

Prints each law as it is decided, then the smallest problem that breaks one, as code. Exit code 0: no law failed; 1: some
did; 2: bad input.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from sm_flex.testing.conformance import Report, each_law, name_of
from sm_flex.testing.laws import LAWS

DTYPES = ("float64", "float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


def load(target: str) -> Callable[..., Any]:
    """module:function, or ValueError that says which of them is missing."""
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise ValueError(f"expected module:function, got {target!r}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may fail in any way while it is imported
        raise ValueError(f"cannot import {module_name}: {type(error).__name__}: {error}") from error
    function: Any = module
    for part in name.split("."):
        if not hasattr(function, part):
            raise ValueError(f"{module_name} has no {name}")
        function = getattr(function, part)
    if not callable(function):
        raise ValueError(f"{target} is not callable, but {type(function).__name__}")
    return function


def main(argv: list[str] | None = None) -> int:
    parser = _Parser(prog="python -m sm_flex.testing", description="Is this function StableMask?")
    parser.add_argument(
        "target", metavar="module:function", help="called as function(q, k, v, *, gamma, length, positions, visible, scale)"
    )
    parser.add_argument("--max-examples", type=int, default=50, metavar="N", help="problems per law (default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of q, k and v (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="where they are (default %(default)s)")
    parser.add_argument("--no-grads", action="store_true", help="for an inference kernel")
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)
    try:
        if args.max_examples < 1:
            raise ValueError(f"--max-examples must be at least 1, got {args.max_examples}")
        _check_device(args.device)
        fn = load(args.target)
        results = each_law(fn, grads=not args.no_grads, dtype=dtype, device=args.device, max_examples=args.max_examples)
        done = []
        for result in results:
            done.append(result)
            print(f"{len(done):2}/{len(LAWS)} {result}", flush=True)
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    report = Report(f"{name_of(fn)}, {args.dtype} on {args.device}", tuple(done))
    print(f"\n{report.headline}")
    print(report.counterexamples, end="")
    return 1 if report.failed else 0


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: {(str(error).splitlines() or [''])[0]}") from error


if __name__ == "__main__":
    sys.exit(main())
