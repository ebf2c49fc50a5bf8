"""What a head attends to: the matrix of eq. 11, its column of first tokens, the real share of each row, its sink.

    from sm_flex.diagnostics import attention_map, first_token_share, real_share, sink_level

For looking at a model, not for training one. Each takes the query, the key and the StableMask of a call of
the drop-ins (None for plain causal attention), in the layout (B, H, S, D). Scores are float32 (float64 for
float64 inputs, and for the level of a sink) whatever kernel the model runs on, and nothing is differentiated.
All work on the dense engine's blocks of rows.

    from sm_flex.diagnostics import column_shares, token_kinds, windowed_attention

is what `python -m sm_flex_transformers.look` measures with: where the attention goes by column and by kind of
token, in one pass and without an S x T tensor, and the attention that is left when a window drops the first token.
"""

from sm_flex.diagnostics.attention import attention_map, first_token_share, real_share
from sm_flex.diagnostics.columns import ColumnShares, column_shares, token_kinds
from sm_flex.diagnostics.sinks import sink_level
from sm_flex.diagnostics.windows import windowed_attention

__all__ = [
    "ColumnShares",
    "attention_map",
    "column_shares",
    "first_token_share",
    "real_share",
    "sink_level",
    "token_kinds",
    "windowed_attention",
]
