"""StableMask for Hugging Face Transformers: importing this package registers two values of ``attn_implementation``.

"stablemask" is StableMask attention. "sm_flex" is the model's own causal attention on the same engines, learned sinks included
(gpt-oss), and StableMask only where the model's config asks for it.

    import sm_flex_transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="stablemask")

It serves every causal decoder that uses Transformers' attention interface. What it needs to know stands in the model's own
config, which is saved and loaded with the weights:

    config.stablemask = {"gamma": "headwise", "length": 2048}

"sink" is one more mass per row, the log of it, and "sink_value" what that mass carries: a pretrained model's attention sinks,
which absorb_sinks() measures and writes.

gamma is "headwise", one number >= 0 (inf is plain causal attention), or a list with one number for each attention head; length
is N, the training length. Left out, they are head-wise and config.max_position_embeddings. Transformers itself does not save
which attention a model was trained with: pass attn_implementation="stablemask" at every load.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from sm_flex_transformers import batching, loading
from sm_flex_transformers.absorb import absorb_sinks, learn_sinks
from sm_flex_transformers.attention import sm_flex_attention, stablemask_attention
from sm_flex_transformers.interface import NAMES
from sm_flex_transformers.masks import stablemask_mask
from sm_flex_transformers.schedule import GammaSchedule

__all__ = [
    "GammaSchedule",
    "absorb_sinks",
    "learn_sinks",
    "sm_flex_attention",
    "stablemask_attention",
    "stablemask_mask",
]

AttentionInterface.register("stablemask", stablemask_attention)
AttentionInterface.register("sm_flex", sm_flex_attention)
# Without a mask function of the same name Transformers passes no mask at all: padding and packing would be lost in silence.
for name in NAMES:
    AttentionMaskInterface.register(name, stablemask_mask)
loading.install()
batching.install()
