"""stablemask(): what the caller wants, as a score_mod. The drop-ins know how to do it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sm_flex.checks.mask import check_gamma, check_length, check_positions, check_sink
from sm_flex.mass.table import Mass

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class StableMask:
    """A request for StableMask attention: make it with :func:`stablemask`, give it to a drop-in as ``score_mod``.

    gamma, length, positions, score_mod, sink and ordered are what stablemask() was given; gamma, and a sink, are always tensors.
    """

    gamma: Tensor
    length: int | None
    positions: Tensor | None
    score_mod: ScoreMod | None
    sink: Tensor | None = None
    ordered: bool = True
    _copies: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False)

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        raise TypeError(
            "a StableMask is more than a score_mod: without the remask after the softmax it attends to the future. "
            "Call sm_flex.flex_attention(..., score_mod=stablemask(...)) instead of torch's own flex_attention "
            "(or pass StableMask.presoftmax, which is eq. 8 alone)."
        )

    def presoftmax(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """A * C + P of eq. 8 as a plain score_mod, for torch's own flex_attention without a block_mask.

        Its softmax is StableMask's before the remask: the output still mixes in the values of future keys, only the
        log-sum-exp is the one that the drop-ins return. Query and key lengths must be equal and are N. On a GPU give
        gamma as a tensor on that GPU.

        Raises:
            ValueError: length, positions or a sink were given; eq. 8 knows none of them.
        """
        if self.length is not None or self.positions is not None or self.sink is not None:
            raise ValueError(
                "presoftmax is eq. 8 of the whole sequence: build the StableMask without length and positions, or sink"
            )
        real = score if self.score_mod is None else self.score_mod(score, b, h, q_idx, kv_idx)
        gamma = self.gamma if self.gamma.dim() == 0 else self.gamma[h]
        return torch.where(q_idx >= kv_idx, real, (-kv_idx * gamma).to(score.dtype))

    def mass(self, device: torch.device, num_queries: int, num_keys: int, cu_seqlens: Tensor | None = None) -> Mass:
        """What log M of a call depends on: S queries, T keys (N where no length was given), documents packed or not."""
        length = num_keys if self.length is None else self.length
        sink = None if self.sink is None else self._on(device, "sink", self.sink)
        return Mass(self._on(device, "gamma", self.gamma), self.positions, cu_seqlens, length, num_queries, sink)

    def _on(self, device: torch.device, name: str, x: Tensor) -> Tensor:
        """gamma or sink on the device of the call; a number is copied there once, so that later calls copy nothing."""
        if x.device == device:
            return x
        if torch.compiler.is_compiling() or x.requires_grad or _get_current_dispatch_mode() is not None:
            return _copy(x, device)
        if (name, device) not in self._copies:
            with torch.inference_mode(False):
                self._copies[name, device] = _copy(x, device)
        return self._copies[name, device]

    def __reduce__(self) -> tuple[Any, ...]:
        return StableMask, (self.gamma, self.length, self.positions, self.score_mod, self.sink, self.ordered)


def stablemask(
    gamma: float | Tensor,
    *,
    length: int | None = None,
    positions: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    sink: float | Tensor | None = None,
    ordered: bool = True,
) -> StableMask:
    """StableMask (Yin et al., ICML 2024) as a score_mod for sm_flex's drop-ins.

    Row p of the attention gets pseudo scores -j * gamma for p < j < N beside its real ones, which take their share of
    the softmax and carry no value: out = (softmax(A * C + P) * C) V (eq. 11).

    Args:
        gamma: the decay rate, a number >= 0 (inf is plain causal attention), or a floating tensor, 0-d or (H,) with one
            rate a query head (see :func:`sm_flex.headwise_gamma`), on the device of the call. One that requires grad is
            learned; keep it positive, e.g. with softplus (its sign is not checked, as it may drift past 0 in a step).
        length: N, the training length. Always pass it where a model will see more than one length: None means the key
            length of the call, so a cache or a longer batch would change old rows. Required with positions, and by
            varlen_attn. From N on a row keeps one pseudo score, -(p+1) gamma (section 4.3).
        positions: (S,) or (B, S) integers ((T_q,) for varlen_attn), the position of each query in its own sequence. None
            means 0..S-1, and query and key lengths must then be equal. Positions feed the mass and nothing else.
        score_mod: an ordinary score_mod (ALiBi, soft-capping) that acts on the real scores first.
        sink: one more pseudo score a row, or the log-sum-exp of several: log M becomes log(e^log M + e^sink). A number, or a
            floating tensor: 0-d, (H,) with one a query head (gpt-oss's learned sinks, with gamma = inf for those alone), or
            broadcastable to (B, H, S) ((H, T_q) for varlen_attn), which is any mass there is. It may require grad.
        ordered: False where slots do not follow the sequence, as the shards of context parallelism may not: the block_mask
            of flex_attention, then required as positions are, alone says who sees whom, and must itself be causal.

    Returns:
        A StableMask. Calling it, as torch's own flex_attention would, raises.

    Under torch.compile a StableMask built outside the compiled region, or one whose gamma is a tensor, never recompiles
    when gamma changes. A Python float turned into a StableMask inside the region follows torch's rules for Python floats
    there: it is a constant of the graph, and a new value compiles anew.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value.

    Example:
        >>> q = k = v = torch.randn(1, 2, 5, 8)
        >>> flex_attention(q, k, v, score_mod=stablemask(0.5, length=16)).shape
        torch.Size([1, 2, 5, 8])
    """
    gamma = check_gamma(gamma)
    if length is not None:
        check_length(length)
    if positions is not None:
        check_positions(positions)
        if length is None:
            raise ValueError("length is required where positions are given: pass stablemask(..., length=N), the training length")
    if not isinstance(ordered, bool):
        raise TypeError(f"ordered must be True or False, got {type(ordered).__name__}")
    if not ordered and positions is None:
        raise ValueError("positions are required with ordered=False: pass stablemask(..., positions=..., length=N)")
    if isinstance(score_mod, StableMask):
        raise TypeError("score_mod of a StableMask must be an ordinary score_mod, got another StableMask")
    if score_mod is not None and not callable(score_mod):
        raise TypeError(f"score_mod must be callable or None, got {type(score_mod).__name__}")
    return StableMask(gamma, length, positions, score_mod, None if sink is None else check_sink(sink), ordered)


def _copy(x: Tensor, device: torch.device) -> Tensor:
    # Some devices (MPS) have no float64; log M is float32 there.
    return x.to(device) if device.type in ("cpu", "cuda") else x.to(device, torch.float32)


def only_stablemask(score_mod: Any, name: str) -> None:
    if not isinstance(score_mod, StableMask):
        raise TypeError(
            f"score_mod of {name} must be a StableMask or None, got {type(score_mod).__name__}: torch's has no score_mod; "
            "use flex_attention, or stablemask(..., score_mod=...)"
        )
