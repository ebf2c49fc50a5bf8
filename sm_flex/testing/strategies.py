"""hypothesis strategies: requests for StableMask attention, drawn as numbers and a seed.

Dimensions are drawn, not tensor elements: a shrunken example is a small problem, and its tensors follow from the seed.
"""

from collections.abc import Collection

import torch

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("requests are drawn by hypothesis: pip install 'sm-flex[test]'", name="hypothesis") from error

from sm_flex.testing.request import FEATURES, Request

LENGTHS = st.sampled_from((1, 2, 3, 5, 8, 13, 31, 32, 33, 64, 67))
HEADS = ((1, 1), (3, 1), (1, 3), (2, 2), (3, 2), (1, 4))  # key heads, and query heads to each
HEAD_DIMS = st.sampled_from((1, 4, 7, 16, 64, 128))
RATES = (0.5, 0.1, 0.0, 2.0**-8, 1e-8, 3.0)


@st.composite
def gammas(draw: st.DrawFn, heads: int, finite: bool = False) -> float | tuple[float, ...]:
    """One rate for all or one a head: 0, tiny, ordinary and, unless finite, 1e4 and inf."""
    rate = st.sampled_from(RATES if finite else (*RATES, 1e4, float("inf")))
    one_a_head = draw(st.booleans())
    return tuple(draw(rate) for _ in range(heads)) if one_a_head else draw(rate)


@st.composite
def requests(
    draw: st.DrawFn,
    *,
    takes: Collection[str] = FEATURES,
    needs: Collection[str] = (),
    finite_gamma: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Request:
    """A request. takes: the FEATURES that it may have. needs: those that it has. finite_gamma: rates with a gradient."""

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
    return Request(
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
        cut=draw(st.integers(0, 99)),
        dtype=dtype,
        device=device,
    )
