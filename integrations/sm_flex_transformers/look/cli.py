"""python -m sm_flex_transformers.look MODEL: a table, and a folder with pictures, figures and a page."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from sm_flex_transformers.look import texts
from sm_flex_transformers.look.errors import BadInput
from sm_flex_transformers.look.run import look

PROG = "python -m sm_flex_transformers.look"
DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog=PROG, description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("--text", type=Path, metavar="FILE", help=f"what it reads, in UTF-8 (default: {texts.BUNDLED})")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a folder that is empty or not there (default: look-MODEL)")
    parser.add_argument("--length", type=int, help=f"tokens of a row (default {texts.LENGTH})")
    parser.add_argument("--rows", type=int, default=texts.ROWS, help="rows, evenly spread over the text (default %(default)s)")
    parser.add_argument("--window", type=int, default=128, help="keys that a row sees in the windows (default %(default)s)")
    parser.add_argument("--keep", type=int, default=4, help="first tokens that the second window keeps (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the model (default %(default)s)")
    parser.add_argument("--device", default=None, help="cuda where there is one, else cpu")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (BadInput, NotImplementedError) as error:
        parser.error(str(error))


def run(args: Any) -> None:
    """All that can be refused is, before the model is loaded; nothing is written before all is measured."""
    for name, least in (("rows", 1), ("window", 1), ("keep", 1), ("length", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise BadInput(f"--{name} must be at least {least}, got {value}")
    missing = [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(
            f"{' and '.join(missing)} must be installed for the pictures and the progress bar: pip install 'sm-flex[bench]'"
        )
    out = Path(f"look-{Path(args.model).resolve().name if Path(args.model).exists() else args.model.replace('/', '-')}")
    out = out if args.out is None else args.out
    check_is_free(out)
    text = None if args.text is None else texts.read(args.text)
    device = device_of(args.device)
    logging.set_verbosity_error()
    config, tokenizer = config_of(args.model), tokenizer_of(args.model)
    rows = texts.rows_of(
        tokenizer, texts.bundled() if text is None else text, config.get_text_config(), args.length, args.rows, args.window
    )
    model = load(args.model, args.dtype, device)
    looked = _with_a_bar(model, tokenizer, text, rows, args)

    from sm_flex_transformers.look import page, pictures, report, table  # matplotlib is there

    name = Path(args.model).resolve().name if Path(args.model).exists() else args.model
    found = report.report_of(looked, model, tokenizer, name, texts.BUNDLED if args.text is None else args.text.name)
    check_is_free(out)
    out.mkdir(parents=True, exist_ok=True)
    report.save(found, out / "report.json")
    pictures.draw(found, out)
    page.write(found, looked, out / "report.html")
    print(table.table(found))
    print(f"\n{out / 'report.html'}, report.json and four pictures are written")


def check_is_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--out {folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise BadInput(f"--out {folder} holds files, and nothing is written over: name another folder, or empty it")


def _with_a_bar(model: Any, tokenizer: Any, text: str | None, rows: texts.Rows, args: Any) -> Any:
    from tqdm import tqdm

    length = rows.kinds.shape[1]
    with tqdm(unit="layer", desc=f"{len(rows.ids)} rows of {length}", leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return look(model, tokenizer, text, length=length, rows=args.rows, window=args.window, keep=args.keep, progress=progress)


def config_of(name: str, who: str = "look") -> Any:
    is_path = Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not (Path(name) / "config.json").is_file():
        raise BadInput(f"MODEL {name} is no folder with a config.json: give the folder that save_pretrained wrote")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        why = "cannot be loaded" if is_path else "is no folder here, and cannot be had from the Hugging Face hub"
        raise BadInput(f"MODEL {name} {why}: {error}") from error
    # BERT and its kind are causal where their config says so.
    encoder = getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", True) is False
    if encoder or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise BadInput(f"MODEL {name} is a {config.model_type} model: {who} takes decoder-only causal language models")
    return config


def tokenizer_of(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # Transformers raises what the tokenizer's own code meets
        raise BadInput(
            f"MODEL {name} has no tokenizer that can be loaded ({type(error).__name__}): save the tokenizer into the folder too"
        ) from error


def device_of(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def load(name: str, dtype: str, device: torch.device) -> Any:
    """With its own attention, or StableMask where its config asks for it; sm_flex needs no mask of S x S for either.

    dtype: of torch, or "auto", as it was saved.
    """
    of_torch = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=of_torch, attn_implementation="sm_flex")
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise BadInput(f"MODEL {name} cannot be loaded: {error}") from error
    return model.to(device).eval()
