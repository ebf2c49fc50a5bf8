"""StableMask for Hugging Face Transformers: importing this package registers ``attn_implementation="stablemask"``.

    import sm_flex_transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="stablemask")

It serves every causal decoder that uses Transformers' attention interface. What it needs to know stands in the model's own
config, which is saved and loaded with the weights:

    config.stablemask = {"gamma": "headwise", "length": 2048}

gamma is "headwise", one number >= 0 (inf is plain causal attention), or a list with one number for each attention head; length
is N, the training length. Left out, they are head-wise and config.max_position_embeddings. Transformers itself does not save
which attention a model was trained with: pass attn_implementation="stablemask" at every load.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from sm_flex_transformers import loading
from sm_flex_transformers.attention import stablemask_attention
from sm_flex_transformers.masks import stablemask_mask
from sm_flex_transformers.schedule import GammaSchedule

__all__ = ["GammaSchedule", "stablemask_attention", "stablemask_mask"]

AttentionInterface.register("stablemask", stablemask_attention)
# Without a mask function of the same name Transformers passes no mask at all: padding and packing would be lost in silence.
AttentionMaskInterface.register("stablemask", stablemask_mask)
loading.install()
