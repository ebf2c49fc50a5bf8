"""lm-evaluation-harness (``pip install lm-eval``) on a StableMask model: its own command line, with stablemask registered.

python -m sm_flex_transformers.lm_eval run --model hf --model_args pretrained=PATH,attn_implementation=stablemask --tasks ...
"""

import sys
from typing import NoReturn


def main() -> None:
    given = sys.argv[1:]
    if any("pretrained=" in x for x in given) and not any("attn_implementation=" in x for x in given):
        _stop("--model_args must hold attn_implementation=stablemask: without it the model runs as plain causal attention")
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        _stop("lm-evaluation-harness is not installed: pip install lm-eval")
    import sm_flex_transformers  # noqa: F401  (registers stablemask)

    cli_evaluate()


def _stop(message: str) -> NoReturn:
    print(f"python -m sm_flex_transformers.lm_eval: error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
