"""hypothesis strategies: problems for a StableMask attention, drawn as numbers and a seed.

Dimensions are drawn, not tensor elements: a shrunken example is a small problem, and its tensors follow from the seed.
"""

from collections.abc import Collection
from typing import Any

import torch

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("problems are drawn by hypothesis: pip install 'sm-flex[testing]'", name="hypothesis") from error

from sm_flex.testing.old_names import find
from sm_flex.testing.problem import FEATURES, Problem

LENGTHS = st.sampled_from((1, 2, 3, 5, 8, 13, 31, 32, 33, 64, 67))
HEADS = ((1, 1), (3, 1), (1, 3), (2, 2), (3, 2), (1, 4))  # key heads, and query heads to each
HEAD_DIMS = st.sampled_from((1, 4, 7, 16, 64, 128))
GAMMAS = (0.5, 0.1, 0.0, 2.0**-8, 1e-8, 3.0)
SINKS = (0.0, -3.0, 1.3, 8.0, float("-inf"))


@st.composite
def gammas(draw: st.DrawFn, heads: int, finite: bool = False) -> float | tuple[float, ...]:
    """One gamma for all heads or one per head: 0, tiny, ordinary and, unless finite, 1e4 and inf."""
    return draw(_for_heads(GAMMAS if finite else (*GAMMAS, 1e4, float("inf")), heads))


@st.composite
def _for_heads(draw: st.DrawFn, values: tuple[float, ...], heads: int) -> float | tuple[float, ...]:
    value = st.sampled_from(values)
    per_head = draw(st.booleans())
    return tuple(draw(value) for _ in range(heads)) if per_head else draw(value)


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    takes: Collection[str] = FEATURES,
    needs: Collection[str] = (),
    finite_gamma: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Problem:
    """A problem. takes: the FEATURES that it may have. needs: those that it has. finite_gamma: no gamma of 1e4 or inf."""

    def has(feature: str) -> bool:
        return feature in needs or (feature in takes and draw(st.booleans()))

    positioned, masked = has("positions"), has("visible")
    kv_heads, groups = draw(st.sampled_from([(n, g) for n, g in HEADS if g == 1 or "grouped" in (*takes, *needs)]))
    if "grouped" in needs and groups == 1:
        groups = 2
    batch, num_keys = draw(st.sampled_from((1, 2, 3))), draw(LENGTHS)
    num_queries, starts, documents, window, hidden = num_keys, None, (), -1, 0.0
    if positioned:
        num_queries = draw(st.one_of(st.just(num_keys), st.integers(1, num_keys)))
        start = st.sampled_from((0, 5, -2, 300))
        starts = draw(st.one_of(st.just((0,)), st.tuples(start), st.tuples(*[start] * batch)))
    if masked:
        if positioned and num_keys > 1:
            documents = tuple(sorted(draw(st.sets(st.integers(1, num_keys - 1), max_size=3))))
        window = draw(st.one_of(st.just(-1), st.integers(0, num_keys)))
        hidden = draw(st.sampled_from((0.0, 0.5) if documents or window != -1 else (0.5, 0.1)))
    with_value = has("sink_value") and ("sink" in (*takes, *needs) or "sink_value" in needs)
    return Problem(
        seed=draw(st.integers(0, 2**31)),
        batch=batch,
        heads=kv_heads * groups,
        kv_heads=kv_heads,
        num_queries=num_queries,
        num_keys=num_keys,
        head_dim=draw(HEAD_DIMS),
        gamma=draw(gammas(kv_heads * groups, finite_gamma)),
        # Below, at and beyond the training length.
        length=max(1, num_keys + draw(st.sampled_from((0, 1, 7, 200, -1, -3)))),
        starts=starts,
        documents=documents,
        window=window,
        hidden=hidden,
        scale=draw(st.sampled_from((0.3, 1.0))) if has("scale") else None,
        spread=draw(st.sampled_from((1.0, 0.0, 5.0))),
        sink=draw(_for_heads(SINKS, kv_heads * groups)) if with_value or has("sink") else None,
        sink_values=draw(st.sampled_from((kv_heads, kv_heads * groups))) if with_value else 0,
        cut=draw(st.integers(0, 99)),
        dtype=dtype,
        device=device,
    )


def __getattr__(name: str) -> Any:
    return find(name, {"requests": problems}, __name__)
