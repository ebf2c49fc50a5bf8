"""The decoder of benchmarks.lm: RMSNorm, SwiGLU, RoPE or ALiBi, attention over packed documents by sm_flex.

What makes it a StableMask model (or a baseline) is score_mod=mask in Attention.forward. why.py also gives it
learned absolute positions.

Shapes in names: T packed tokens of a batch of R rows, S = T / R, W width, H heads, D head dim, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lm.presets import Size
from benchmarks.lm.text import IGNORED, Packed
from benchmarks.lm.variants import Mass, Variant
from sm_flex import headwise_gamma, scaled_dot_product_attention, varlen_attn


@dataclass
class Plan:
    """What the attention of every layer needs to know of a batch.

    window: keys that a query sees, its own among them; None for all of its document. kept: first tokens of
    the document that a query sees beside the window. As in StreamingLLM, their positions are at the beginning
    of the window, not at their distance in the text.
    """

    batch: Packed
    position: str
    head_dim: int
    window: int | None = None
    kept: int = 0

    def __post_init__(self) -> None:
        positions_T = self.batch.positions_T
        if self.position == "rope":
            self.rope = rope_table(positions_T, self.head_dim)
            if self.kept:
                assert self.window is not None
                self.kept_rope = rope_table(positions_T.clamp(max=self.window - 1), self.head_dim)
        self.by_rows = self.position == "alibi" or self.kept > 0
        self.positions = positions_T.unflatten(0, (self.batch.rows, -1)) if self.by_rows else positions_T
        self.mask_RHSS = self._mask() if self.by_rows else None

    def turned(self, x_THD: Tensor) -> Tensor:
        """q or k at its position, where that is RoPE's affair."""
        return rotate(x_THD, self.rope) if self.position == "rope" else x_THD

    def _mask(self) -> Tensor:
        """Who sees whom, (R, 1, S, S): bool, or for ALiBi minus the distance, for Attention to multiply."""
        positions_RS, batch = self.positions, self.batch
        starts_T = torch.zeros_like(batch.positions_T).index_fill(0, batch.cu_seqlens[:-1].long(), 1)
        document_RS = starts_T.cumsum(0).unflatten(0, (batch.rows, -1))
        distance = positions_RS[:, :, None] - positions_RS[:, None, :]
        visible = (document_RS[:, :, None] == document_RS[:, None, :]) & (distance >= 0)
        if self.window is not None:
            first = positions_RS[:, None, :] < self.kept
            visible &= (distance < self.window - self.kept) | first
            in_window = positions_RS.clamp(max=self.window - 1)[:, :, None] - positions_RS[:, None, :]
            distance = torch.where(first, in_window, distance)
        if self.position == "rope":
            return visible.unsqueeze(1)
        return (-distance.float()).masked_fill(~visible, -torch.inf).unsqueeze(1)


class Attention(nn.Module):
    slopes: Tensor

    def __init__(self, size: Size, variant: Variant) -> None:
        super().__init__()
        self.heads = size.heads
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)
        self.mass = Mass(variant, size.heads, size.length, size.width // size.heads)
        self.register_buffer("slopes", headwise_gamma(size.heads), persistent=False)
        self.watch: list[tuple[Tensor, Tensor]] | None = None  # where set, (q, k) of each call, (R, H, S, D)

    def forward(self, x_TW: Tensor, plan: Plan) -> Tensor:
        q_THD, k_THD, v_THD = self.qkv(x_TW).unflatten(1, (3, self.heads, -1)).unbind(1)
        mask = self.mass(plan.positions)
        if self.watch is not None:
            assert plan.position == "alibi" or not plan.kept
            self.watch.append((_by_rows(plan.turned(q_THD), plan), _by_rows(plan.turned(k_THD), plan)))
        if plan.by_rows:
            return self.out(self._by_rows(q_THD, k_THD, v_THD, plan, mask))
        # The whole of StableMask: score_mod in a call that is otherwise torch's own.
        longest = len(plan.positions) // plan.batch.rows
        out_THD = varlen_attn(
            plan.turned(q_THD), plan.turned(k_THD), v_THD, plan.batch.cu_seqlens, plan.batch.cu_seqlens,
            longest, longest, window_size=(-1 if plan.window is None else plan.window - 1, 0), score_mod=mask,
        )  # fmt: skip
        assert isinstance(out_THD, Tensor)
        if self.mass.variant.rescaled:
            out_THD = out_THD / self.mass.share_at_scores_0(plan.positions).T.unsqueeze(-1)
        return self.out(out_THD.flatten(1))

    def alibi(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score - self.slopes[h] * (q_idx - kv_idx)

    def _by_rows(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, plan: Plan, mask) -> Tensor:
        attn_mask = plan.mask_RHSS
        assert attn_mask is not None
        scale = q_THD.shape[-1] ** -0.5
        if plan.position == "alibi":
            # 0 times -inf is NaN: the slopes go to what is visible.
            attn_mask = torch.where(torch.isneginf(attn_mask), attn_mask, attn_mask * self.slopes[:, None, None])
        else:
            # Two angles for each query: one for the keys of the window, one for the kept. A key has zeros where it is not.
            first = (plan.batch.positions_T < plan.kept)[:, None, None]
            k_near = rotate(k_THD, plan.rope)
            k_THD = torch.cat([k_near.masked_fill(first, 0.0), k_near.masked_fill(~first, 0.0)], dim=-1)
            q_THD = torch.cat([rotate(q_THD, plan.rope), rotate(q_THD, plan.kept_rope)], dim=-1)
        q, k, v = [_by_rows(x, plan) for x in (q_THD, k_THD, v_THD)]
        out = scaled_dot_product_attention(q, k, v, attn_mask, scale=scale, score_mod=mask)
        return out.transpose(1, 2).flatten(0, 1).flatten(1)


class SwiGLU(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        hidden = 2 * size.hidden // 3
        self.gate_up = nn.Linear(size.width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, size.width, bias=False)

    def forward(self, x_TW: Tensor) -> Tensor:
        gate, up = self.gate_up(x_TW).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, size: Size, variant: Variant) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.RMSNorm(size.width, eps=1e-6), Attention(size, variant)
        self.norm_2, self.mlp = nn.RMSNorm(size.width, eps=1e-6), SwiGLU(size)

    def forward(self, x_TW: Tensor, plan: Plan) -> Tensor:
        x_TW = x_TW + self.attention(self.norm_1(x_TW), plan)
        return x_TW + self.mlp(self.norm_2(x_TW))


class Decoder(nn.Module):
    """Tokens, the separator and the artificial token in; scores of the text's next token out."""

    def __init__(self, size: Size, variant: Variant, position: str = "rope") -> None:
        super().__init__()
        self.head_dim, self.position = size.width // size.heads, position
        self.embed = nn.Embedding(size.vocab + 2, size.width)
        self.blocks = nn.ModuleList(Block(size, variant) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width, eps=1e-6)
        self.head = nn.Linear(size.width, size.vocab, bias=False)
        self.places = nn.Embedding(size.length + 1, size.width) if position == "absolute" else None
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and not name.endswith("sink_values"):  # which start at 0
                nn.init.normal_(weight, std=0.02)
            if size.init == "zero" and (name == "head.weight" or name.endswith("out.weight")):
                nn.init.zeros_(weight)

    def forward(self, batch: Packed, window: int | None = None, kept: int = 0) -> Tensor:
        """(T, V)."""
        x_TW = self.embed(batch.tokens_T)
        if self.places is not None:
            x_TW = x_TW + self.places(batch.positions_T)
        plan = Plan(batch, self.position, self.head_dim, window, kept)
        for block in self.blocks:
            x_TW = block(x_TW, plan)
        return self.head(self.norm(x_TW))

    @property
    def attentions(self) -> list[Attention]:
        """By layer."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    def losses(self, batch: Packed, window: int | None = None, kept: int = 0) -> Tensor:
        """(T,) nats of each target, 0 where there is none."""
        logits_TV = self(batch, window, kept)
        return F.cross_entropy(logits_TV.float(), batch.targets_T, ignore_index=IGNORED, reduction="none")


def rope_table(positions_T: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin (T, 1, D/2) of RoPE's angles."""
    frequencies = 10000.0 ** -torch.linspace(0, 1, head_dim // 2 + 1, device=positions_T.device)[:-1]
    angles = positions_T[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x_THD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    a, b = x_THD.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x_THD)  # the table is float32


def _by_rows(x_THD: Tensor, plan: Plan) -> Tensor:
    """(R, H, S, D)."""
    return x_THD.unflatten(0, (plan.batch.rows, -1)).transpose(1, 2)
