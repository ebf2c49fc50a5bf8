"""StableMask (Yin et al., ICML 2024) for every attention entry point that PyTorch has.

    from sm_flex import flex_attention, headwise_gamma, stablemask
    out = flex_attention(q, k, v, score_mod=stablemask(headwise_gamma(num_heads), length=2048))

Three drop-ins (flex_attention, scaled_dot_product_attention, varlen_attn), the request they take (stablemask), and the
pieces for kernels of your own (remask, log_mass, headwise_gamma).
"""

from sm_flex._version import __version__ as __version__
from sm_flex.dropins.flex import flex_attention
from sm_flex.dropins.sdpa import scaled_dot_product_attention
from sm_flex.dropins.varlen import varlen_attn
from sm_flex.epilogue.remask import remask
from sm_flex.mass.gamma import headwise_gamma
from sm_flex.mass.table import log_mass
from sm_flex.score_mod import StableMask, stablemask

__all__ = [
    "StableMask",
    "flex_attention",
    "headwise_gamma",
    "log_mass",
    "remask",
    "scaled_dot_product_attention",
    "stablemask",
    "varlen_attn",
]
