"""stablemask(): what the caller wants, as a score_mod. The drop-ins know how to do it."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from sm_flex.checks.mask import check_gamma, check_length, check_position_values, check_positions, check_sink, check_sink_value
from sm_flex.mass.cache import Inputs, cached_table, find_table
from sm_flex.mass.closed_form import largest_pseudo_score, row_positions, sink_by_rows
from sm_flex.mass.table import Mass
from sm_flex.runtime import HAS_TRITON, PLAIN_TENSORS, device_type, differentiable, plain_eager, readable, watched


class ScoreMod(Protocol):
    """(score, b, h, q_idx, kv_idx) -> score, all of them 0-d tensors, as torch's flex_attention takes it."""

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class StableMask:
    """StableMask attention as a score_mod: made by :func:`stablemask`, given to a drop-in.

    gamma, length, positions, score_mod, sink, sink_value and ordered are what stablemask() was given. gamma,
    and a sink, are tensors here.
    """

    gamma: Tensor
    length: int | None
    positions: Tensor | None
    score_mod: ScoreMod | None
    sink: Tensor | None = None
    ordered: bool = True
    sink_value: Tensor | None = None
    _copies: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False)

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        raise TypeError(
            "a StableMask is more than a score_mod: without the remask after the softmax it attends to the future. "
            "Call sm_flex.flex_attention(..., score_mod=stablemask(...)) instead of torch's own flex_attention "
            "(or pass StableMask.presoftmax, which is eq. 8 alone)."
        )

    def presoftmax(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """A * C + P of eq. 8 as a plain score_mod, for torch's own flex_attention without a block_mask.

        Its softmax is StableMask's before the remask: the log-sum-exp is the one that the drop-ins return,
        but the output still mixes in the values of future keys. Query and key lengths must be equal and are
        N. On a GPU give gamma as a tensor on that GPU.

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

    def mass(
        self,
        device: torch.device,
        num_queries: int,
        num_keys: int,
        dtype: torch.dtype,
        cu_seqlens: Tensor | None = None,
        heads: int | None = None,
        heads_last: bool = False,
        planned: bool = False,
    ) -> Mass:
        """log M of a call with S queries, T keys and scores of dtype. N is T where no length was given.

        Here alone it is decided who computes log M. The Triton kernel does so inside its one launch, but has
        no gradient for gamma, knows no sink and has no float64. For all else log M is a table, which is
        small.

        cu_seqlens: the documents of packed rows, whose positions restart at each where the mask has no
            positions.
        heads: H of the call, to each of which the sink's value goes. None, where only the mass is asked for:
            without that value.
        heads_last: a table has all H heads, and the memory order of the CPU kernel's lse (mass/cache.py).
        planned: the call has a plan (plans.py).
        """
        gamma = self.gamma if planned else self._on(device, "gamma", self.gamma)
        table_of = find_table if planned else cached_table
        length = num_keys if self.length is None else self.length
        cu_seqlens = cu_seqlens if self.positions is None else None
        columns = heads if heads_last and heads is not None else 0
        if self.sink is None:
            in_kernel = not planned and HAS_TRITON and device_type(device) == "cuda" and dtype == torch.float32
            if in_kernel and not differentiable(gamma):
                return Mass(None, gamma, self.positions, cu_seqlens, length)
            return Mass(table_of(Inputs(gamma, self.positions, cu_seqlens, None, length, num_queries, dtype), columns))
        sink = self.sink if planned else self._on(device, "sink", self.sink)
        if plain_eager() and self._has_no_gamma():  # the sink is all the mass there is
            if self.positions is not None:
                check_position_values(self.positions)
            rows = sink_by_rows(sink, dtype)
            table = rows.expand(*rows.shape[:-1], num_queries)
        else:
            table = table_of(Inputs(gamma, self.positions, cu_seqlens, sink, length, num_queries, dtype), columns)
        if self.sink_value is None or heads is None:
            return Mass(table)
        value, groups = self.sink_value.to(dtype), heads // self.sink_value.shape[0]
        value_HD = value if groups == 1 else value.repeat_interleave(groups, dim=0)
        return Mass(table, sink_HS=sink_by_rows(sink, dtype), sink_value_HD=value_HD)

    def _has_no_gamma(self) -> bool:
        """gamma is the number inf. Asked of a number alone: to read a tensor of the user's may wait for a device."""
        gamma = self.gamma
        return gamma.dim() == 0 and not gamma.requires_grad and readable(gamma) and math.isinf(gamma.item())

    @cached_property
    def kind(self) -> tuple[Any, ...] | None:
        """What the checks of a call look at in a mask of plain tensors on the CPU (plans.py); None for any other mask."""
        tensors = [self.gamma, self.positions, self.sink, self.sink_value]
        plain = [x is None or (x.is_cpu and type(x) in PLAIN_TENSORS) for x in tensors]
        if self.score_mod is not None or not self.ordered or not all(plain):
            return None
        return (self.length, *[None if x is None else x.shape for x in tensors])

    def largest_pseudo_score(self, device: torch.device, num_queries: int, num_keys: int) -> Tensor:
        """The largest pseudo score of each row, for a mask without a sink: float32, broadcastable to (B, H, S)."""
        positions = row_positions(num_queries, None, device) if self.positions is None else self.positions
        length = num_keys if self.length is None else self.length
        return largest_pseudo_score(self._on(device, "gamma", self.gamma).float(), positions, length)

    def _on(self, device: torch.device, name: str, x: Tensor) -> Tensor:
        """gamma or sink on the device of the call. A number goes there once, and later calls find it there."""
        if x.device == device:
            return x
        if torch.compiler.is_compiling() or x.requires_grad or watched():
            return _to_device(x, device)
        if (name, device) not in self._copies:
            with torch.inference_mode(False):
                self._copies[name, device] = _to_device(x, device)
        return self._copies[name, device]

    def __reduce__(self) -> tuple[Any, ...]:
        return StableMask, (self.gamma, self.length, self.positions, self.score_mod, self.sink, self.ordered, self.sink_value)


def stablemask(
    gamma: float | Tensor,
    *,
    length: int | None = None,
    positions: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    sink: float | Tensor | None = None,
    sink_value: Tensor | None = None,
    ordered: bool = True,
) -> StableMask:
    """StableMask (Yin et al., ICML 2024) as a score_mod for sm_flex's drop-ins.

    Row p of the attention gets pseudo scores -j * gamma for p < j < N beside its real ones. They take their
    share of the softmax and carry no value: out = (softmax(A * C + P) * C) V (eq. 11).

    Args:
        gamma: the decay of the pseudo scores, a number >= 0 (inf is plain causal attention), or a floating
            tensor on the device of the call: 0-d, or (H,) with one gamma per query head (see
            :func:`sm_flex.headwise_gamma`). One that requires grad is learned. Keep it positive, e.g. with
            softplus; its sign is not checked, since a learned gamma may drift past 0 in a step.
        length: N, the training length. Always pass it where a model will see more than one length. None means
            the key length of the call, so a cache or a longer batch would change old rows. Required with
            positions, and by varlen_attn. From N on a row keeps one pseudo score, -(p+1) gamma (section 4.3).
        positions: (S,) or (B, S) integers ((T_q,) for varlen_attn), the position of each query in its own
            sequence. None means 0..S-1, and query and key lengths must then be equal. Positions feed the mass
            and nothing else.
        score_mod: an ordinary score_mod (ALiBi, soft-capping), which acts on the real scores first.
        sink: one more pseudo score per row, or the log-sum-exp of several: log M becomes log(e^log M +
            e^sink). A number, or a floating tensor: 0-d, (H,) with one per query head (gpt-oss's learned
            sinks; with gamma = inf they are all the mass there is), or broadcastable to (B, H, S) ((H, T_q)
            for varlen_attn), which can stand for any mass. It may require grad.
        sink_value: what the sink's pseudo score carries, where it is not to be a bin without a value: out' = s
            out + p_sink sink_value, p_sink = exp(sink - lse'). A floating tensor on the device of the call,
            (H, Dv) with one value per query head, or (Hkv, Dv) with one for the query heads of each key head.
            A pretrained model's attention sink is of this kind. Needs a sink; it may require grad. A row that
            sees no key then gives the share of the value that is left to it, and not 0.
        ordered: False where slots do not follow the sequence, as in the shards of context parallelism. Then
            the block_mask of flex_attention alone says which keys a query sees, and must itself be causal. It
            is required, as are positions.

    Returns:
        A StableMask. Calling it, as torch's own flex_attention would, raises.

    Under torch.compile a StableMask built outside the compiled region, or one whose gamma is a tensor, never
    recompiles when gamma changes. A Python float turned into a StableMask inside the region follows torch's
    rules for Python floats there: it is a constant of the graph, and a new value compiles anew.

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
    sink = None if sink is None else check_sink(sink)
    if sink_value is not None:
        check_sink_value(sink_value, sink)
    return StableMask(gamma, length, positions, score_mod, sink, ordered, sink_value)


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    # Some devices (MPS) have no float64; log M is float32 there.
    dtype = x.dtype if device.type in ("cpu", "cuda") else torch.float32
    if x.dim() or x.requires_grad or x.device.type != "cpu":
        return x.to(device, dtype)
    # A copy from the host would wait for the device, and no CUDA graph can record it. A fill does not, nor does
    # an operand of 0 dimensions, whose value the kernel is given.
    if readable(x) and get_proxy_mode() is None:
        return torch.full((), x.item(), dtype=dtype, device=device)
    return torch.zeros((), dtype=dtype, device=device) + x
