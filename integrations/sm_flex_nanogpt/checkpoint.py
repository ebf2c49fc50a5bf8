"""A checkpoint remembers its attention: an entry "attn" in the model_args that nanoGPT's train.py writes into it.

One without the entry is causal, so what nanoGPT wrote by itself is known too. And nanoGPT's own sample.py, started without
the launcher, stops at the entry that GPTConfig does not know, where it would have sampled with the wrong attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sm_flex_launcher.flags import Flags

ENTRY = "attn"


@contextmanager
def patched_checkpoints(flags: Flags) -> Iterator[None]:
    """While open, torch.save adds the attention to nanoGPT's checkpoints, and torch.load refuses those of another.

    Raises:
        BadInput: from torch.load.
    """
    save, load = torch.save, torch.load

    def save_with_attention(obj: Any, *args: Any, **kwargs: Any) -> None:
        if _is_checkpoint(obj) and flags.attn != "causal":
            obj = {**obj, "model_args": {**obj["model_args"], ENTRY: flags.name}}
        save(obj, *args, **kwargs)

    def load_checked(*args: Any, **kwargs: Any) -> Any:
        obj = load(*args, **kwargs)
        if _is_checkpoint(obj):
            flags.check(obj["model_args"].pop(ENTRY, "causal"))
        return obj

    torch.save, torch.load = save_with_attention, load_checked
    try:
        yield
    finally:
        torch.save, torch.load = save, load


def _is_checkpoint(obj: Any) -> bool:
    return isinstance(obj, dict) and "model" in obj and isinstance(obj.get("model_args"), dict)
