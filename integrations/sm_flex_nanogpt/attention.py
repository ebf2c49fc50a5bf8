"""nanoGPT's CausalSelfAttention, with StableMask between its two projections.

The checkout's own class is the base: it makes the same weights from the same seed and has the same state_dict. Only its
forward is ours, and that is an honest replacement only where the checkout's forward is plain causal attention between
c_attn and c_proj. So replace() tries both on random numbers first, ours with gamma = inf, and refuses a checkout whose
attention does something else, or has other weights, which would be lost. It is a probe and no proof: what shows only after
LENGTH tokens, or by chance not at all, passes.

Shapes in names: B batch, S positions, C channels (n_embd), H heads, D head dim.
"""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sm_flex import scaled_dot_product_attention, stablemask
from sm_flex_launcher.flags import BadInput, Flags

WEIGHTS = {"c_attn.weight", "c_attn.bias", "c_proj.weight", "c_proj.bias"}
LENGTH = 1100  # of the probe: more than the sliding windows that people use


def replace(model: ModuleType, flags: Flags) -> None:
    """Put StableMask attention in the place of model.CausalSelfAttention, for every GPT made from now on.

    Raises:
        BadInput: model is not nanoGPT's model.py, or its attention is not plain causal attention.
    """
    _probe(model)
    model.CausalSelfAttention = stable(model.CausalSelfAttention, flags)  # pyright: ignore[reportAttributeAccessIssue]


def stable(base: Any, flags: Flags) -> type[nn.Module]:
    """base, a CausalSelfAttention, with out = (softmax(A * C + P) * C) V (eq. 11) in its forward; N is block_size."""

    class StableMaskSelfAttention(base):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.config = config  # of the whole model: crop_block_size changes block_size in it
            # Moves with the model, and is not part of its state_dict.
            self.register_buffer("gamma", flags.gamma_for(config.n_head), persistent=False)

        def forward(self, x_BSC: Tensor) -> Tensor:
            q_BHSD, k_BHSD, v_BHSD = [
                x.unflatten(2, (self.n_head, -1)).transpose(1, 2) for x in self.c_attn(x_BSC).split(self.n_embd, dim=2)
            ]
            out_BHSD = scaled_dot_product_attention(
                q_BHSD, k_BHSD, v_BHSD,
                dropout_p=self.dropout if self.training else 0.0, is_causal=True,
                score_mod=stablemask(self.gamma, length=self.config.block_size),
            )  # fmt: skip
            return self.resid_dropout(self.c_proj(out_BHSD.transpose(1, 2).flatten(2)))

    return StableMaskSelfAttention


def _probe(model: ModuleType) -> None:
    """Refuse a model.py whose attention is not ours with gamma = inf."""
    causal = Flags("stablemask", str(math.inf), switch=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # the script's own seeds stay as they are
        try:
            config = model.GPTConfig(block_size=LENGTH, vocab_size=11, n_layer=1, n_head=3, n_embd=15, dropout=0.0, bias=True)
            theirs = model.CausalSelfAttention(config).double().eval()
            for weights in theirs.parameters():
                torch.nn.init.normal_(weights)
            ours = stable(model.CausalSelfAttention, causal)(config).double().eval()
            ours.load_state_dict(theirs.state_dict())
            x_BSC = torch.randn(1, LENGTH, 15, dtype=torch.float64)
            same = torch.allclose(ours(x_BSC), theirs(x_BSC), rtol=1e-9, atol=1e-9)
            same = same and set(dict(theirs.named_parameters())) == WEIGHTS
        except (AttributeError, TypeError, RuntimeError) as error:
            raise BadInput(f"{model.__file__} has not the interface of nanoGPT's: {error}") from None
    if not same:
        raise BadInput(
            f"CausalSelfAttention of {model.__file__} is not plain causal attention between c_attn and c_proj: what it does "
            "beside that would be lost, so call sm_flex.scaled_dot_product_attention in it yourself"
        )
