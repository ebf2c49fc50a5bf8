"""StableMask (Yin et al., ICML 2024) for every attention entry point that PyTorch has.

    from sm_flex import flex_attention, headwise_gamma, stablemask
    out = flex_attention(q, k, v, score_mod=stablemask(headwise_gamma(num_heads), length=2048))

Three drop-ins (flex_attention, scaled_dot_product_attention, varlen_attn), the score_mod they take
(stablemask), gamma as a config writes it (headwise_gamma, gamma_from), and the pieces for kernels of your own
(remask, log_mass).

Words, here and inside:
    S, T, N             the queries and keys of the call, and the training length
    p                   the position of a query in its own sequence
    A, C, P             the scores, the causal mask of zeros and ones, and the pseudo scores -j * gamma above the diagonal (eq. 8)
    mass, log M         sum of e^(-j gamma) for p < j < N, what the pseudo scores of a row take of its softmax, and its log
    lse, lse'           log-sum-exp of a row's real scores, and of the real and the pseudo scores together
    real share s        sigmoid(lse - log M), what of a row's attention goes to real tokens (alpha in section 4.2)
    remask, epilogue    out' = s * out, the step after the softmax
    sink, sink value    one more pseudo score per row, and the value v that it may carry: out' = s * out + exp(sink - lse') * v
    fully masked row    one that sees no key: lse = -inf, out' = 0, or what is left to it of a sink's value
"""

from sm_flex._version import __version__ as __version__
from sm_flex.dropins.flex import flex_attention
from sm_flex.dropins.sdpa import scaled_dot_product_attention
from sm_flex.dropins.varlen import varlen_attn
from sm_flex.epilogue.remask import remask
from sm_flex.mass.closed_form import log_mass
from sm_flex.mass.gamma import gamma_from, headwise_gamma, length_from
from sm_flex.score_mod import ScoreMod, StableMask, stablemask

__all__ = [
    "ScoreMod",
    "StableMask",
    "flex_attention",
    "gamma_from",
    "headwise_gamma",
    "length_from",
    "log_mass",
    "remask",
    "scaled_dot_product_attention",
    "stablemask",
    "varlen_attn",
]
