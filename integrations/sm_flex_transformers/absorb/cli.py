"""python -m sm_flex_transformers.absorb MODEL --out PATH: the model with its sinks in its config, and what that costs.

PATH is loaded by from_pretrained(PATH, attn_implementation="stablemask"). Nothing is trained.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from sm_flex_transformers.absorb.apply import ROWS, absorb_sinks, check_config, check_model
from sm_flex_transformers.absorb.measure import Sinks
from sm_flex_transformers.look import cli, texts
from sm_flex_transformers.look.errors import BadInput
from sm_flex_transformers.look.losses import losses_through, runs_in_pieces
from sm_flex_transformers.look.measure import Window

PROG = "python -m sm_flex_transformers.absorb"
MEASURED, HELD_OUT = 8, 8  # rows of the text


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser(prog=PROG, description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="a folder that is empty or not there")
    parser.add_argument("--text", type=Path, metavar="FILE", help=f"what it reads, in UTF-8 (default: {texts.BUNDLED})")
    parser.add_argument("--window", type=int, default=64, help="keys that a row sees in the window (default %(default)s)")
    parser.add_argument("--keep", type=int, default=4, help="first tokens kept beside the window (default %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", *cli.DTYPES), help="of the model (default: as it was saved)")
    parser.add_argument("--device", default=None, help="cuda where there is one, else cpu")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (BadInput, NotImplementedError, ValueError) as error:
        parser.error(str(error))


def run(args: Any) -> None:
    """All that can be refused is, before the model is loaded or measured; PATH is written last."""
    for name in ("window", "keep"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} must be at least 1, got {getattr(args, name)}")
    length = ROWS[1]
    if args.window + args.keep >= length:
        raise BadInput(f"--window {args.window} and --keep {args.keep} must be less than a row of {length} tokens together")
    cli.check_is_free(args.out)
    text = texts.bundled() if args.text is None else texts.read(args.text)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = cli.config_of(args.model, "absorb")
    check_config(config)
    tokenizer = cli.tokenizer_of(args.model)
    measured, held_out = _split(texts.rows_of(tokenizer, text, config.get_text_config(), None, 10**6, args.window).ids)
    model = cli.load(args.model, args.dtype, cli.device_of(args.device))
    check_model(model)

    in_pieces = runs_in_pieces(model, held_out[0])
    before = {name: _loss(model, held_out, around, in_pieces) for name, around in _views(args.window, args.keep).items()}
    found = absorb_sinks(model, list(measured))
    after = {name: _loss(model, held_out, around, in_pieces) for name, around in _views(args.window, args.keep).items()}
    print(table(found, before, after, len(measured), held_out))
    cli.check_is_free(args.out)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f'\n{args.out} is written: from_pretrained("{args.out}", attn_implementation="stablemask")')


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Up to MEASURED rows from the first part of the text and up to HELD_OUT from the rest, evenly spread over each."""
    if len(rows) < 2 or rows.shape[1] - 1 < ROWS[1]:
        raise BadInput(
            f"the text is good for {len(rows)} row{'' if len(rows) == 1 else 's'} of {rows.shape[1] - 1} tokens, and two of "
            f"{ROWS[1]} are needed, to measure on and to check: give a longer text"
        )
    rows, cut = rows[:, : ROWS[1] + 1], max(1, len(rows) // 2)
    return tuple(
        part[torch.linspace(0, len(part) - 1, min(most, len(part))).round().long()]
        for part, most in ((rows[:cut], MEASURED), (rows[cut:], HELD_OUT))
    )  # pyright: ignore[reportReturnType]


def _views(window: int, keep: int) -> dict[str, Any]:
    def nothing() -> None: ...

    return {
        "all keys": None,
        f"window of {window}, nothing kept": Window(window, 0, nothing),
        f"window of {window} and the first {keep}": Window(window, keep, nothing),
    }


def _loss(model: Any, rows: Tensor, around: Any, in_pieces: bool) -> float:
    rows = rows.to(model.get_input_embeddings().weight.device)
    return torch.stack([losses_through(around, model, ids, in_pieces) for ids in rows]).mean().item()


def table(found: Sinks, before: dict[str, float], after: dict[str, float], measured: int, held_out: Tensor) -> str:
    level, share = [torch.cat([x for x in part if x is not None]) for part in (found.level, found.share)]
    low, middle, high = level.double().quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    layers = sum(x is not None for x in found.level)
    lines = [
        f"{len(level)} heads in {layers} layers, on {measured} rows: the first token has {share.mean():.1%} of a row, more than "
        f"half in {int((share > 0.5).sum())} heads",
        f"levels (log mass): {low:.2f} (10 %), {middle:.2f} (median), {high:.2f} (90 %)",
        "",
        f"nats a token, {len(held_out)} rows of {held_out.shape[1] - 1} tokens held out",
        f"{'':34}{'before':>10}{'absorbed':>10}{'change':>10}",
    ]
    lines += [f"{name:34}{before[name]:10.4f}{after[name]:10.4f}{after[name] - before[name]:+10.4f}" for name in before]
    return "\n".join(lines)
