"""Does a model have attention sinks? What it attends to, on a text: python -m sm_flex_transformers.look MODEL

    from sm_flex_transformers.look import look

    report = look(model, tokenizer, text)

serves every causal model in Transformers' attention interface (eager, sdpa, flash attention, stablemask, sm_flex), with
StableMask or without. The model runs as it is: its logits stay the same to the bit. The numbers are of single sequences without
padding. What it measures with stands in sm_flex.diagnostics, for code that is not Transformers'.
"""

from sm_flex_transformers.look.errors import BadInput
from sm_flex_transformers.look.measure import Looked
from sm_flex_transformers.look.run import look

__all__ = ["BadInput", "Looked", "look"]
