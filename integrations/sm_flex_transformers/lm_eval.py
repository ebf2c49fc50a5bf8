"""lm-evaluation-harness (``pip install lm-eval``): its own command line, with stablemask and sm_flex registered.

    python -m sm_flex_transformers.lm_eval run --model hf --model_args pretrained=PATH,attn_implementation=stablemask --tasks ...

A model that runs another attention is refused: its scores would carry StableMask's name. sm_flex is StableMask too where the
model's config.stablemask asks for it, and the model's own attention where it does not.
"""

import functools
import sys
from typing import Any, NoReturn


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        _stop("lm-evaluation-harness is not installed: pip install lm-eval")
    from sm_flex_transformers.interface import NAMES  # which registers them

    make = HFLM.__init__

    @functools.wraps(make)
    def make_and_look(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        attention = self.model.config.get_text_config()._attn_implementation
        if attention not in NAMES:
            _stop(f"the model runs {attention}, not stablemask or sm_flex: give attn_implementation=stablemask in --model_args")

    HFLM.__init__ = make_and_look
    cli_evaluate()


def _stop(message: str) -> NoReturn:
    print(f"python -m sm_flex_transformers.lm_eval: error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
