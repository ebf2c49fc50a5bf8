"""For everything that is not StableMask the drop-ins are torch's own functions: signature, result, error."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
import torch.nn.attention.varlen as torch_varlen
import torch.nn.functional as F
from torch import Tensor

import sm_flex

NEWEST_VARLEN = ["enable_gqa", "seqused_k", "block_table", "num_splits"]  # torch 2.11 has none of these


def parameters(fn: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(fn).parameters.values()]


def test_flex_attention_has_torchs_signature():
    assert parameters(sm_flex.flex_attention) == parameters(torch_flex.flex_attention)


def test_varlen_attn_has_torchs_signature_and_score_mod():
    ours, theirs = parameters(sm_flex.varlen_attn), parameters(torch_varlen.varlen_attn)
    assert ours[-1] == ("score_mod", inspect.Parameter.KEYWORD_ONLY, None)
    known = {name for name, _, _ in theirs}
    assert [p for p in ours[:-1] if p[0] in known] == theirs
    assert [name for name, _, _ in ours[:-1] if name not in known] == [n for n in NEWEST_VARLEN if n not in known]


def test_scaled_dot_product_attention_has_torchs_signature_and_score_mod():
    ours = parameters(sm_flex.scaled_dot_product_attention)
    assert ours[-1] == ("score_mod", inspect.Parameter.KEYWORD_ONLY, None)
    # torch's is a builtin; its schema has the names, order and defaults.
    schema = torch.ops.aten.scaled_dot_product_attention.default._schema
    keyword = {a.name: a.kwarg_only for a in schema.arguments}
    empty = inspect.Parameter.empty
    theirs = [
        (
            a.name,
            inspect.Parameter.KEYWORD_ONLY if keyword[a.name] else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            a.default_value if a.has_default_value() else empty,
        )
        for a in schema.arguments
    ]
    assert ours[:-1] == theirs


def outcome(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """The result, or the kind and words of the error."""
    try:
        return fn(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


Q, K2 = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((Q, Q, Q), {}),
        ((Q, Q, Q), {"is_causal": True, "scale": 0.3}),
        ((Q, K2, K2), {"enable_gqa": True}),
        ((Q[0], Q[0], Q[0]), {}),
        ((Q, Q, Q, torch.rand(7, 7) > 0.5), {}),
        ((Q, Q, Q, torch.rand(7, 7) > 0.5, 0.0, True), {}),
        ((Q, Q, Q), {"dropout_p": 2.0}),
        ((Q, K2, K2), {}),
        ((Q, Q.double(), Q), {}),
        ((Q, 3, Q), {}),
    ],
)
def test_scaled_dot_product_attention_is_torchs_own(args: tuple[Any, ...], kwargs: dict[str, Any]):
    expected = outcome(F.scaled_dot_product_attention, *args, **kwargs)
    assert same(outcome(sm_flex.scaled_dot_product_attention, *args, **kwargs), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:return_lse is deprecated")
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((Q, Q, Q), {}),
        ((Q, Q, Q, lambda s, b, h, i, j: s - (i - j) * 0.1), {}),
        ((Q, K2, K2), {"enable_gqa": True, "scale": 0.3}),
        ((Q, Q, Q), {"return_lse": True}),
        ((Q, Q, Q), {"return_aux": torch_flex.AuxRequest(lse=True)}),
        ((Q, Q, Q), {"return_aux": torch_flex.AuxRequest(lse=True), "return_lse": True}),
        ((Q, K2, K2), {}),
        ((Q, Q, Q), {"kernel_options": {"BACKEND": "NONE"}}),
        ((Q[0], Q[0], Q[0]), {}),
        ((Q.clone().requires_grad_(), Q, Q), {}),
    ],
)
def test_flex_attention_is_torchs_own(args: tuple[Any, ...], kwargs: dict[str, Any]):
    expected = outcome(torch_flex.flex_attention, *args, **kwargs)
    assert same(outcome(sm_flex.flex_attention, *args, **kwargs), expected)


def test_varlen_attn_is_torchs_own():
    """On a CPU torch's varlen_attn has no kernel: the same error, before and after."""
    q = torch.randn(7, 2, 8)
    cu = torch.tensor([0, 7], dtype=torch.int32)
    expected = outcome(torch_varlen.varlen_attn, q, q, q, cu, cu, 7, 7)
    assert isinstance(expected, tuple)
    assert same(outcome(sm_flex.varlen_attn, q, q, q, cu, cu, 7, 7), expected)


def test_varlen_attn_passes_every_argument_on(monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, Any] = {}
    real = torch_varlen.varlen_attn
    monkeypatch.setattr(torch_varlen, "varlen_attn", lambda *a, **kw: seen.update(kw, args=a))
    q = torch.randn(7, 2, 8)
    cu = torch.tensor([0, 7], dtype=torch.int32)
    aux = torch_varlen.AuxRequest(lse=True)
    sm_flex.varlen_attn(q, q, q, cu, cu, 7, 7, return_aux=aux, scale=0.3, window_size=(2, 0))
    assert seen["args"][3:] == (cu, cu, 7, 7)
    assert {k: seen[k] for k in ("return_aux", "scale", "window_size")} == {
        "return_aux": aux,
        "scale": 0.3,
        "window_size": (2, 0),
    }
    newer = {"enable_gqa": True, "seqused_k": cu, "block_table": cu, "num_splits": 1}
    for name, x in newer.items():
        if name in inspect.signature(real).parameters:
            sm_flex.varlen_attn(q, q, q, cu, cu, 7, 7, **{name: x})
            assert seen[name] is x
        else:
            with pytest.raises(NotImplementedError, match=f"{name} is not known to varlen_attn of torch"):
                sm_flex.varlen_attn(q, q, q, cu, cu, 7, 7, **{name: x})


def test_results_have_the_shapes_of_torchs():
    mask = sm_flex.stablemask(0.5)
    assert isinstance(sm_flex.flex_attention(Q, Q, Q, score_mod=mask), Tensor)
    out, lse = sm_flex.flex_attention(Q, Q, Q, score_mod=mask, return_lse=True)
    assert isinstance(lse, Tensor)
    assert lse.shape == (2, 4, 7)
    again, aux = sm_flex.flex_attention(Q, Q, Q, score_mod=mask, return_aux=torch_flex.AuxRequest(lse=True))
    assert isinstance(aux, torch_flex.AuxOutput)
    assert aux.max_scores is None
    assert torch.equal(out, again)
    _, aux = sm_flex.flex_attention(Q, Q, Q, score_mod=mask, return_aux=torch_flex.AuxRequest())
    assert isinstance(aux, torch_flex.AuxOutput)
    assert aux.lse is None


def test_public_names():
    assert set(sm_flex.__all__) == {
        "ScoreMod", "StableMask", "flex_attention", "gamma_from", "headwise_gamma", "length_from", "log_mass", "remask",
        "scaled_dot_product_attention", "stablemask", "varlen_attn",
    }  # fmt: skip
    for name in sm_flex.__all__:
        assert getattr(sm_flex, name).__doc__
