"""A checkpoint remembers its attention: an entry "attn" in the model_config that nanochat writes into meta_*.json.

One without the entry is causal. nanochat started without the launcher stops at the entry, which its GPTConfig does not know,
where it would have run the model with the wrong attention (only base_train's resume reads no config, and goes on).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sm_flex_launcher.flags import Flags

ENTRY = "attn"


@contextmanager
def patched_checkpoints(manager: Any, flags: Flags) -> Iterator[None]:
    """While open, nanochat's save_checkpoint adds the attention, and its load_checkpoint refuses that of another.

    Raises:
        BadInput: from load_checkpoint.
    """
    save, load = manager.save_checkpoint, manager.load_checkpoint

    @functools.wraps(save)
    def save_with_attention(
        checkpoint_dir: str, step: int, model_data: Any, optimizer_data: Any, meta_data: dict[str, Any], rank: int = 0
    ) -> None:
        if flags.attn != "causal":
            meta_data = {**meta_data, "model_config": {**meta_data["model_config"], ENTRY: flags.name}}
        save(checkpoint_dir, step, model_data, optimizer_data, meta_data, rank=rank)

    @functools.wraps(load)
    def load_checked(*args: Any, **kwargs: Any) -> tuple[Any, Any, dict[str, Any]]:
        model_data, optimizer_data, meta_data = load(*args, **kwargs)
        flags.check(meta_data["model_config"].pop(ENTRY, "causal"))
        return model_data, optimizer_data, meta_data

    manager.save_checkpoint, manager.load_checkpoint = save_with_attention, load_checked
    try:
        yield
    finally:
        manager.save_checkpoint, manager.load_checkpoint = save, load
