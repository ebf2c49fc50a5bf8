"""What look measures is what the model's own attention weights say, and the model does not notice."""

import functools
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, GptOssConfig, masking_utils

from sm_flex.engines import dense
from sm_flex.testing import oracle
from sm_flex_transformers.look import BadInput, calls, look, texts
from sm_flex_transformers.look.losses import next_token_losses, runs_in_pieces
from sm_flex_transformers.look.measure import Measure
from sm_flex_transformers.look.report import report_of, sentences
from sm_flex_transformers.look.run import ALL, KEPT, WINDOW
from tests.core.test_diagnostics import Largest
from tests.helpers.looking import BOS, CHARACTERS, TEXT, plain, tokenizer, with_sink_at
from tests.helpers.transformers_models import COMMON, CONFIGS, SOFT_CAPPED, agree, model_of, tokens

GPT_OSS = functools.partial(
    GptOssConfig, **COMMON, num_key_value_heads=2, head_dim=8, sliding_window=7, num_local_experts=2, num_experts_per_tok=1
)
MODELS: dict[str, Any] = {**CONFIGS, "gemma2": lambda: type(SOFT_CAPPED)(**SOFT_CAPPED.to_dict()), "gpt-oss": GPT_OSS}
LENGTH, SPAN, KEEP = 44, 9, 3  # of a row, and of the window
ARGUMENTS: dict[str, Any] = {"length": LENGTH, "rows": 3, "window": SPAN, "keep": KEEP}


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention asks for its softmax in float32."""
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda x, dim=None, dtype=None: softmax(x, dim=dim))


def attention_of(name: str) -> list[str]:
    return ["eager", "sm_flex"] if name in ("gpt-oss", "gemma2") else ["eager", "sdpa", "sm_flex"]


PAIRS = [(name, attention) for name in MODELS for attention in attention_of(name)]


@pytest.mark.parametrize(("name", "attention"), [*PAIRS, ("llama-gqa", "stablemask"), ("gemma3", "stablemask")])
def test_the_model_does_not_notice(name: str, attention: str) -> None:
    """Logits to the bit, and what was put around its attention is gone afterwards."""
    config = MODELS[name]()
    model, ids = model_of(config if attention == "stablemask" else plain(config), attention), tokens(1, LENGTH)
    model.float()
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        measure = Measure(LENGTH, 8, lambda: None)
        measure.begin(torch.arange(LENGTH) % 3)
        ask = AttentionInterface.get_interface
        with calls.around_attention(measure):
            within = model(input_ids=ids, use_cache=False).logits
        assert AttentionInterface.get_interface is ask
        assert len(measure.layers) == 2
        assert torch.equal(before, within)
        assert torch.equal(before, model(input_ids=ids, use_cache=False).logits)


def weights_of(model: Any, ids: Tensor) -> list[Tensor]:
    """Of each layer, (H, S, S), by the model's own eager attention."""
    with torch.no_grad():
        return [x[0] for x in model(input_ids=ids[None], use_cache=False, output_attentions=True).attentions]


def check_shares(found: Any, weights: list[list[Tensor]], kinds: Tensor) -> None:
    """Against the layers' matrices for each row of the text."""
    far = found.far
    for layer, of_texts in zip(found.layers, zip(*weights, strict=True), strict=True):
        matrices = torch.stack(list(of_texts))  # (texts, H, S, S)
        agree(layer.mean("first_far"), matrices[..., far:, 0].mean((0, 2)))
        agree(layer.mean("real_far"), matrices[..., far:, :].sum(-1).mean((0, 2)))
        for kind in range(3):
            by_text = [x[:, far:, row == kind].sum(-1).mean(1) for x, row in zip(matrices, kinds, strict=True)]
            agree(layer.mean("kinds")[:, kind], torch.stack(by_text).mean(0))
        edges = [*found.positions, LENGTH]
        for i, (start, end) in enumerate(itertools.pairwise(edges)):
            agree(layer.mean("first")[:, i], matrices[..., start:end, 0].mean((0, 2)))
            agree(layer.mean("real")[:, i], matrices[..., start:end, :].sum(-1).mean((0, 2)))
        columns = torch.stack([matrices[..., j + far :, j].mean(-1) for j in range(1, LENGTH - 2 * far + 1)], -1)
        agree(layer.mean("other"), columns.amax(-1).mean(0))
        agree(layer.mean("other_mean"), columns.mean(1).amax(-1).mean(0))
        assert layer.other_slots == (columns.mean(1).argmax(-1) + 1).tolist()
        assert layer.mean("cells").shape == (6, LENGTH, LENGTH)  # a short text's cells are the matrix
        agree(layer.mean("cells"), matrices.mean(0))


@pytest.mark.parametrize(("name", "attention"), PAIRS)
@pytest.mark.usefixtures("wide")
def test_shares_are_those_of_the_eager_model(name: str, attention: str) -> None:
    config = plain(MODELS[name]())
    eager, model = model_of(config, "eager"), model_of(plain(MODELS[name]()), attention)
    found = look(model, tokenizer(), TEXT, **ARGUMENTS)
    weights = [weights_of(eager, ids[:-1]) for ids in found.rows.ids]
    check_shares(found, weights, found.rows.kinds)
    if name == "gpt-oss":
        assert (found.layers[0].mean("real_far") < 0.999).all()


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_shares_of_stablemask_are_equation_11(name: str) -> None:
    model = model_of(MODELS[name](), "stablemask")
    found = look(model, tokenizer(), TEXT, **ARGUMENTS)
    taken: list[Tensor] = []

    def take(attention: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        unit = torch.eye(LENGTH).double().expand(*key.shape[:3], -1)
        seen = torch.ones(LENGTH, LENGTH).tril().bool()
        if kwargs.get("sliding_window"):
            seen = seen.triu(1 - kwargs["sliding_window"])
        gamma = torch.exp2(-torch.tensor([2, 4, 6, 8, 1, 3]).double())  # ALiBi's slopes for six heads
        taken.append(oracle(query, key, unit, gamma=gamma, length=23, scale=kwargs["scaling"], visible=seen)[0][0])
        return attention(module, query, key, value, *args, **kwargs)

    weights = []
    with torch.no_grad(), calls.around_attention(take):
        for ids in found.rows.ids:
            taken.clear()
            model(input_ids=ids[None, :-1], use_cache=False)
            weights.append(list(taken))
    check_shares(found, weights, found.rows.kinds)
    assert (found.layers[0].mean("real_far") < 1).all()


def masks(name: str, keep: int) -> Any:
    """The window as 4-D masks, which Transformers takes as they are: the layer's own window is to be said too."""
    distance = torch.arange(LENGTH).unsqueeze(1) - torch.arange(LENGTH)
    seen = (distance >= 0) & ((distance < SPAN) | (torch.arange(LENGTH) < keep))
    full, sliding = (torch.zeros(1, 1, LENGTH, LENGTH).double().masked_fill(~x, -math.inf) for x in (seen, seen & (distance < 7)))
    if name in ("gpt-oss", "gemma2", "gemma3"):
        return {"full_attention": full, "sliding_attention": sliding}
    return sliding if name == "mistral" else full


@pytest.mark.parametrize(("name", "attention"), [*PAIRS, ("llama-gqa", "stablemask"), ("gemma3", "stablemask")])
@pytest.mark.usefixtures("wide")
def test_losses_in_windows_are_those_behind_a_mask(name: str, attention: str) -> None:
    config = MODELS[name]()
    config = config if attention == "stablemask" else plain(config)
    model = model_of(config, attention)
    reference = model if attention == "stablemask" else model_of(config, "eager")
    found = look(model, tokenizer(), TEXT, **ARGUMENTS)
    for key, mask in ((ALL, None), (WINDOW, masks(name, 0)), (KEPT, masks(name, KEEP))):
        for ids, losses in zip(found.rows.ids, found.losses[key], strict=True):
            with torch.no_grad():
                logits = reference(input_ids=ids[None, :-1], attention_mask=mask, use_cache=False).logits[0]
            agree(losses.double(), F.cross_entropy(logits.float(), ids[1:], reduction="none").double(), 1e-5)
    if name != "mistral":  # whose own window is shorter
        assert (found.losses[WINDOW] - found.losses[ALL]).abs().max() > 1e-3
        assert (found.losses[KEPT] - found.losses[WINDOW])[:, SPAN:].abs().max() > 1e-3


def test_losses_in_pieces_are_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through whatever the model does to its logits; the layers run once."""
    monkeypatch.setattr("sm_flex_transformers.look.losses.ROWS", 7)
    config = plain(MODELS["gemma2"]())
    config.final_logit_softcapping = 3.0
    model, ids = model_of(config, "eager"), tokens(1, LENGTH + 1)[0]
    ran: list[int] = []
    layers: Any = model.model.layers
    hook = layers[0].register_forward_hook(lambda *args: ran.append(1))
    assert runs_in_pieces(model, ids)
    ran.clear()
    pieces = next_token_losses(model, ids, True)
    assert len(ran) == 1
    hook.remove()
    agree(pieces, next_token_losses(model, ids, False), 1e-6)
    with torch.no_grad():
        logits = model(input_ids=ids[None, :-1]).logits[0]
    agree(pieces, F.cross_entropy(logits.float(), ids[1:], reduction="none"), 1e-6)
    assert "forward" not in vars(model.base_model)


def test_norms_are_those_of_the_hidden_states() -> None:
    model = model_of(plain(MODELS["llama"]()), "sdpa")
    model.model.norm = torch.nn.Identity()  # the last hidden states of Transformers are behind it
    found = look(model, tokenizer(), TEXT, **ARGUMENTS)
    of_texts = []
    for ids in found.rows.ids:
        with torch.no_grad():
            states = model(input_ids=ids[None, :-1], output_hidden_states=True).hidden_states
        of_texts.append(torch.stack([x[0].float().norm(dim=-1) for x in states]))
    norms = torch.stack(of_texts)
    agree(found.norms[:, 0], norms[..., 0].mean(0), 1e-5)
    agree(found.norms[:, 1], norms[..., 1:].amax((0, 2)), 1e-5)
    agree(found.norms[:, 2], norms[..., 1:].median(-1).values.mean(0), 1e-5)


def test_a_sink_that_was_put_there_is_found() -> None:
    """On the BOS token; its massive activation too."""
    model, letters = with_sink_at(BOS), tokenizer(bos=True)
    found = look(model, letters, TEXT, length=200, rows=2, window=40)
    report = report_of(found, model, letters, "planted", "text")
    assert (found.rows.ids[:, 0] == BOS).all()
    assert report["first"]["mean"] > 0.95
    assert report["first"]["heads_above"] == 12
    assert report["other_column"]["largest"]["share"] < 0.01
    assert report["kinds"]["mean"][0] > 0.95
    assert report["norms"]["first"][0] == 5.0
    assert "12 of 12 heads give it more than 30 %" in sentences(report)[0]


def test_a_sink_that_moved_is_found_where_it_went() -> None:
    """The same one on the first line break, slot 5: the first token looks cured, the other column does not."""
    model = with_sink_at(CHARACTERS.index("\n") + 2)
    text = "alice\n" + TEXT.replace("\n", " ")
    found = look(model, tokenizer(), text, length=200, rows=1, window=40)
    report = report_of(found, model, tokenizer(), "planted", "text")
    assert report["first"]["mean"] < 0.01
    assert report["other_column"]["largest"]["share"] > 0.95
    assert report["other_column"]["slots"] == [[5], [5]]
    assert report["other_column"]["tokens"] == [["\n"], ["\n"]]
    assert report["kinds"]["mean"][1] > 0.95


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gpt-oss"])
def test_memory_is_linear_in_the_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No S x S tensor, of sliding windows either."""
    monkeypatch.setattr(dense, "BLOCK_SCORES", 1 << 14)
    config = plain(MODELS[name]())
    config.max_position_embeddings = 4096
    model = model_of(config, "sm_flex")

    def largest(length: int) -> int:
        with Largest() as mode:
            look(model, tokenizer(), TEXT * 4, length=length, rows=1, window=64)
        return mode.elements

    short, long = largest(300), largest(1500)
    assert long <= 5.5 * short
    assert long < 1500 * 1500 // 8


def test_what_was_put_around_a_model_is_gone_after_an_error() -> None:
    model, ask = model_of(plain(MODELS["llama"]()), "sdpa"), AttentionInterface.get_interface
    model.train()

    def stop(done: int, total: int) -> None:
        assert (done, total) == (1, 18)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look(model, tokenizer(), TEXT, **ARGUMENTS, progress=stop)
    assert AttentionInterface.get_interface is ask
    assert "forward" not in vars(model.base_model)
    assert model.training
    layers: Any = model.model.layers
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_the_bundled_text_fills_rows_of_8192_tokens() -> None:
    """Of a usual tokenizer, some four characters a token; it is prose in ASCII."""
    text = texts.bundled()
    assert 40_000 < len(text) < 48_000
    assert text.isascii()
    assert "Down the Rabbit-Hole" in text


LLAMA = plain(MODELS["llama"]())


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("", {}, "the text has 0 tokens: it must be longer than the window, 9"),
        ("a", {}, "the text has 1 token: it must be longer than the window, 9"),
        (
            "abcdefghij",
            {"length": None, "window": 9},
            "the text has 10 tokens: it must be longer than the window, 9.*smaller --window",
        ),
        (TEXT, {"length": 9}, "a row of 9 tokens must be longer than the window, 9"),
        (TEXT, {"length": 65}, "--length 65 is longer than the 64 positions of the model"),
        (TEXT[:30], {"length": 30}, "--length 30 is longer than the text, which has 30 tokens"),
        (TEXT, {"rows": 0}, "rows must be an int >= 1, got 0"),
        (TEXT, {"window": 2.5}, "window must be an int >= 1, got 2.5"),
    ],
)
def test_texts_and_lengths_that_are_refused(text: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        look(model_of(LLAMA, "sdpa"), tokenizer(), text, **{**ARGUMENTS, **given})


def without_compile(make: Any, *args: Any, **kwargs: Any) -> Any:
    """Transformers passes a flag that torch deprecates."""
    return make(*args, **{**kwargs, "_compile": False})


def test_models_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(plain(MODELS["llama"]()), "flex_attention")
    monkeypatch.setattr(masking_utils, "create_block_mask", functools.partial(without_compile, create_block_mask))
    with pytest.raises(NotImplementedError, match="got a BlockMask for its mask: load the model with attn_implementation"):
        look(model.float(), tokenizer(), TEXT, **ARGUMENTS)
    model = model_of(plain(MODELS["llama"]()), "sdpa")
    layers: Any = model.model.layers
    layers[1].self_attn.is_causal = False
    with pytest.raises(NotImplementedError, match=r"LlamaAttention \(layer 1\) is not causal: look takes decoder-only"):
        look(model, tokenizer(), TEXT, **ARGUMENTS)
