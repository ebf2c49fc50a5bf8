"""A pretrained model's attention sinks, put into its config: a mass per head, that carries what the first token carries.

    from sm_flex_transformers import absorb_sinks

    absorb_sinks(model, texts, tokenizer=tokenizer)
    model.save_pretrained(path)  # from_pretrained(path, attn_implementation="stablemask") is all that restores it

or ``python -m sm_flex_transformers.absorb MODEL --out PATH``.
"""

from sm_flex_transformers.absorb.apply import absorb_sinks
from sm_flex_transformers.absorb.learned import learn_sinks
from sm_flex_transformers.absorb.measure import Sinks

__all__ = ["Sinks", "absorb_sinks", "learn_sinks"]
