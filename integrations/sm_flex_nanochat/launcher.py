"""The command: read our flags, replace nanochat's two attention functions, run its script as __main__."""

import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import sm_flex_nanochat
from sm_flex_launcher.flags import BadInput, exit_on_bad_input, parse_flags
from sm_flex_nanochat import attention, checkpoint

PROG = "python -m sm_flex_nanochat"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a script of the checkout that is the working directory; bad input is one line on stderr and exit code 2."""
    with exit_on_bad_input(PROG):
        flags, rest = parse_flags(sys.argv[1:] if argv is None else argv, sm_flex_nanochat.__doc__ or "")
        script = _script(rest)
        sys.path.insert(0, str(Path.cwd()))
        sys.argv = rest
        if flags.attn == "stablemask":
            attention.replace(importlib.import_module("nanochat.flash_attention"), importlib.import_module("nanochat.gpt"), flags)
        with checkpoint.patched_checkpoints(importlib.import_module("nanochat.checkpoint_manager"), flags):
            runpy.run_module(script, run_name="__main__", alter_sys=True)


def _script(rest: Sequence[str]) -> str:
    if not rest or rest[0].startswith("-"):
        raise BadInput("name nanochat's script first, as in scripts.base_train")
    script = Path(*rest[0].split(".")).with_suffix(".py")
    for file in (Path("nanochat", "gpt.py"), Path("nanochat", "flash_attention.py"), script):
        if not file.is_file():
            raise BadInput(f"this is not a nanochat checkout: no {file} in {Path.cwd()}")
    return rest[0]
