"""The command: read our flags, turn them into one of torchtitan's overrides, check it, run torchtitan's own training."""

import copy
import json
import sys
from collections.abc import Sequence
from typing import Any

import sm_flex_torchtitan
from sm_flex_launcher.flags import BadInput, canonical_gamma, exit_on_bad_input, spec_of
from sm_flex_torchtitan import BACKENDS
from sm_flex_torchtitan.versions import check_versions

PROG = "python -m sm_flex_torchtitan.train"
OURS = "sm_flex_torchtitan.overrides"
FLAGS = ("--attn", "--attn.gamma", "--attn.length", "--attn.learned")
IMPORTS = "--override.imports"
# Whose translation into Hugging Face's form stops at a key that it does not know. The others' pass over it.
STRICT_IN_HF = ("deepseek_v3", "kimi_k2_5")


def main(argv: Sequence[str] | None = None) -> None:
    """Train with torchtitan; bad input is one line on stderr and exit code 2, before any device is touched."""
    with exit_on_bad_input(PROG):
        flags, rest = _take(sys.argv[1:] if argv is None else list(argv))
        command = _with_override(flags, rest)
        _check(command, learned=flags.get("--attn.learned", "False") != "False")
    from torchtitan import train

    sys.argv = [sys.argv[0], *command]
    train.main()


def _take(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Our flags, as --flag value or --flag=value, and the rest of the command line in its order."""
    if "--help" in argv or "-h" in argv:
        print((sm_flex_torchtitan.__doc__ or "").strip())
        raise SystemExit(0)
    flags: dict[str, str] = {}
    rest = []
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag in FLAGS:
            takes_next = not equals and words and (flag != "--attn.learned" or words[0] in ("True", "False"))
            flags[flag] = words.pop(0) if takes_next else value
        elif flag.startswith("--attn"):
            raise BadInput(f"{flag} is not known: {', '.join(FLAGS)} are")
        else:
            rest.append(word)
    return flags, rest


def _with_override(flags: dict[str, str], rest: list[str]) -> list[str]:
    """torchtitan's command line with our override among its imports."""
    attn = flags.get("--attn")
    if attn not in ("stablemask", *BACKENDS):
        raise BadInput(
            f"--attn must be given as stablemask, {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}, got {attn or 'nothing'}"
        )
    for flag in FLAGS[1:]:
        if attn != "stablemask" and flag in flags:
            raise BadInput(f"{flag} belongs to --attn stablemask, got --attn {attn} {flag} {flags[flag]}".rstrip())
    if attn == "stablemask":
        ours = f"{OURS}.stablemask={json.dumps(_stablemask(flags))}"
    else:
        ours = f"{OURS}.attention_backend={json.dumps({'name': attn})}"
    # torchtitan's own varlen configs do the same: the bounds of the documents are read on the host.
    extra = ["--training.disable_cuda_graphs"] if attn == "varlen" else []
    for i, word in enumerate(rest):
        flag, equals, value = word.partition("=")
        if flag == IMPORTS:
            return [*extra, *rest[:i], IMPORTS, ours, *([value] if equals else []), *rest[i + 1 :]]
    return [*extra, IMPORTS, ours, *rest]


def _stablemask(flags: dict[str, str]) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"gamma": spec_of(canonical_gamma(flags.get("--attn.gamma", "headwise"), "--attn.gamma"))}
    length = flags.get("--attn.length")
    if length is not None:
        if not length.isascii() or not length.isdigit():
            raise BadInput(f"--attn.length must be a whole number, the training length, got {length!r}")
        kwargs["length"] = int(length)
    learned = flags.get("--attn.learned", "False")
    if learned not in ("", "True", "False"):
        raise BadInput(f"--attn.learned is given as it is, or as True or False, got {learned!r}")
    if learned != "False":
        kwargs["learned"] = True
    return kwargs


def _check(command: list[str], *, learned: bool) -> None:
    """Apply the overrides as the trainer will, to a config that is thrown away."""
    try:
        check_versions()
        from torchtitan.config import ConfigManager
        from torchtitan.config.override import apply_overrides

        config: Any = copy.deepcopy(ConfigManager().parse_args(command))
        config.model_spec.model.update_from_config(config=config)
        replaced = apply_overrides(config.override, config)
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise BadInput(str(error)) from None
    if not any(OURS in line for line in replaced):
        raise BadInput(f"the model of {config.model_spec.name} has no attention that --attn could replace")
    checkpoint, name = config.checkpoint, config.model_spec.name
    if learned and checkpoint.enable and checkpoint.last_save_in_hf:
        raise BadInput("--checkpoint.last_save_in_hf cannot be used with --attn.learned: what it writes would lack gamma")
    if learned and checkpoint.enable and checkpoint.initial_load_in_hf and name in STRICT_IN_HF:
        raise BadInput(
            f"--checkpoint.initial_load_in_hf of {name} cannot be used with --attn.learned: torchtitan stops at its keys"
        )


if __name__ == "__main__":
    main()
