"""The command: read our flags, replace the attention of the checkout's model.py, run its script as __main__."""

import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import sm_flex_nanogpt
from sm_flex_launcher.flags import BadInput, exit_on_bad_input, parse_flags
from sm_flex_nanogpt import attention, checkpoint

PROG = "python -m sm_flex_nanogpt"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a script of the checkout that is the working directory; bad input is one line on stderr and exit code 2."""
    with exit_on_bad_input(PROG):
        flags, rest = parse_flags(sys.argv[1:] if argv is None else argv, sm_flex_nanogpt.__doc__ or "")
        script = _script(rest)
        # As for `python train.py`: its folder comes first, and its arguments are all it sees.
        sys.path.insert(0, str(script.resolve().parent))
        sys.argv = rest
        if flags.attn == "stablemask":
            model = _import_model(script)
            attention.replace(model, flags)
        with checkpoint.patched_checkpoints(flags):
            runpy.run_path(str(script), run_name="__main__")


def _script(rest: Sequence[str]) -> Path:
    if not rest or rest[0].startswith("-"):
        raise BadInput("name nanoGPT's script first: train.py, sample.py or bench.py")
    script = Path(rest[0])
    for file in (script, script.parent / "model.py", Path("configurator.py")):
        if not file.is_file():
            raise BadInput(f"this is not a nanoGPT checkout: no {file} in {Path.cwd()}")
    return script


def _import_model(script: Path) -> ModuleType:
    """The model.py that the script is about to import."""
    model = importlib.import_module("model")
    expected = script.resolve().with_name("model.py")
    if model.__file__ is None or Path(model.__file__).resolve() != expected:
        raise BadInput(f"model must be imported from {expected}, got {model.__file__}")
    return model
