"""What sm_flex_transformers refuses: each in words that name the argument, and never in silence."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    CodeGenForCausalLM,
    GPT2Config,
    PreTrainedModel,
)

from sm_flex_transformers import GammaSchedule, schedule, settings, stablemask_attention
from tests.helpers.transformers_models import COMMON, CONFIGS, LENGTH, agree, config_class, model_of, tokens

LOWEST = torch.tensor(torch.finfo(torch.float64).min, dtype=torch.float64)


def llama(**changes: Any) -> PreTrainedModel:
    config = CONFIGS["llama"]()
    for name, value in changes.items():
        setattr(config, name, value)
    return model_of(config)


@pytest.mark.parametrize(
    ("setting", "error", "why"),
    [
        ({"gamma": [0.5, 0.25]}, ValueError, "one number for each of the model's 6 query heads, got 2"),
        ({"gamma": -0.5}, ValueError, "must be >= 0"),
        ({"gamma": float("nan")}, ValueError, "must be >= 0"),
        ({"gamma": [0.1, 0.1, 0.1, 0.1, 0.1, -1]}, ValueError, "must be >= 0"),
        ({"gamma": "steep"}, TypeError, "\"headwise\", a number or a list of numbers, got 'steep'"),
        ({"gamma": True}, TypeError, "got True"),
        ({"gamma": None}, TypeError, "got None"),
        ({"gamma": {"a": 1}}, TypeError, "must be \"headwise\", a number or a list of numbers, got {'a': 1}"),
        ({"gamma": [0.1, [2], 3, 4, 5, 6]}, TypeError, 'must be "headwise", a number or a list of numbers'),
        ({"length": 0}, ValueError, '"length"\\] must be at least 1, got 0'),
        ({"length": 2.5}, TypeError, "must be an int, the training length, got 2.5"),
        ({"lenght": 5}, ValueError, "knows gamma, length, sink and sink_value, got 'lenght'"),
        ("headwise", TypeError, "must be a dict"),
    ],
)
def test_a_wrong_setting(setting: Any, error: type, why: str) -> None:
    with pytest.raises(error, match=why):
        llama(stablemask=setting)(tokens(1, 5))


def test_true_is_no_number_even_after_1() -> None:
    llama(stablemask={"gamma": 1, "length": 9})(tokens(1, 5))
    with pytest.raises(TypeError, match="got True"):
        llama(stablemask={"gamma": True, "length": 9})(tokens(1, 5))


def test_a_mask_of_ours_that_was_written_to_is_read_anew() -> None:
    from transformers.masking_utils import create_causal_mask

    model = llama(_attn_implementation="stablemask")
    padding = torch.tensor([[0, 1, 1, 1, 1]])
    mask = create_causal_mask(model.config, torch.zeros(1, 5, 48, dtype=torch.float64), padding, None)
    assert mask is not None
    model(tokens(1, 5), attention_mask=mask)
    mask[..., :4, 4] = True
    with pytest.raises(NotImplementedError, match="lets a query see a later key"):
        model(tokens(1, 5), attention_mask=mask)


def test_a_missing_setting_is_headwise_at_max_position_embeddings() -> None:
    ids = tokens(2, 19)
    with torch.no_grad():
        default = llama(stablemask=None)(ids).logits
        spelled_out = llama(stablemask={"gamma": "headwise", "length": COMMON["max_position_embeddings"]})(ids).logits
    assert torch.equal(default, spelled_out)


def test_a_missing_length_without_max_position_embeddings() -> None:
    config = SimpleNamespace(stablemask={"gamma": 0.5}, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"no max_position_embeddings: set config\.stablemask"):
        settings.read(config, None, torch.device("cpu"))


def test_output_attentions_is_refused() -> None:
    model = llama()
    with pytest.raises(NotImplementedError, match="output_attentions=True"):
        model(tokens(1, 5), output_attentions=True)
    with pytest.raises(NotImplementedError, match="output_attentions=True"):
        model.generate(tokens(1, 5), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)  # pyright: ignore[reportCallIssue]


def test_an_encoder_is_refused() -> None:
    small: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(**small)
    config._attn_implementation = "stablemask"
    model = BertModel(config)
    with pytest.raises(NotImplementedError, match="causal"):
        model(tokens(1, 5))


def test_an_encoder_decoder_is_refused() -> None:
    config = BartConfig(d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    config._attn_implementation = "stablemask"
    with pytest.raises(NotImplementedError, match=r"causal|decoder-only"):
        BartModel(config)(tokens(1, 5))


def test_a_model_made_bidirectional_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="bidirectional"):
        llama(is_causal=False)(tokens(1, 5))
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(NotImplementedError, match="LlamaAttention is not"):
        model(tokens(1, 5))


NO_INTERFACE = "do not use Transformers' attention interface"


@pytest.mark.parametrize("model_type", ["bloom", "mpt", "xglm"])
def test_a_model_without_the_attention_interface_is_refused(model_type: str) -> None:
    """Its own attention would go on without StableMask, and without the causal mask that it counts on."""
    sizes = {"num_attention_heads": 4, "n_head": 4, "n_embd": 32, "hidden_size": 32, "d_model": 32}
    small = config_class(model_type)(vocab_size=61, n_layer=1, num_layers=1, **sizes)
    with pytest.raises(NotImplementedError, match=NO_INTERFACE):
        model_of(small)(tokens(1, 5))


def test_codegen_is_served_where_it_uses_the_attention_interface() -> None:
    """It does from Transformers 5.24 on, and has an attention of its own before."""
    config = config_class("codegen")(
        vocab_size=61, n_layer=2, n_head=4, n_embd=32, rotary_dim=8, initializer_range=0.3, stablemask=COMMON["stablemask"]
    )
    ids = tokens(2, 9)
    if not CodeGenForCausalLM._supports_attention_backend:
        with pytest.raises(NotImplementedError, match=NO_INTERFACE):
            model_of(config)
        return
    with torch.no_grad():
        agree(model_of(config)(ids).logits, model_of(config, "oracle")(ids).logits)


def custom(kind: str) -> Tensor:
    causal = torch.ones(5, 5, dtype=torch.bool).tril().expand(1, 1, 5, 5)
    if kind == "future":
        return torch.ones_like(causal)
    if kind == "bias":
        return torch.full_like(causal, -0.5, dtype=torch.float64)
    if kind == "int":
        return causal.long()
    if kind == "wide":
        return causal[..., :1].expand(1, 1, 5, 7)
    assert kind == "float padding"
    return torch.where(causal, 0.0, LOWEST)


@pytest.mark.parametrize(
    ("kind", "error", "why"),
    [
        ("future", NotImplementedError, "lets a query see a later key"),
        ("bias", NotImplementedError, "lets a query see a later key"),
        ("int", TypeError, "must be bool or floating, got torch.int64"),
        ("wide", ValueError, r"with S=5 and T=5, got \(1, 1, 5, 7\)"),
    ],
)
def test_a_custom_mask_that_is_no_padding_mask(kind: str, error: type, why: str) -> None:
    with pytest.raises(error, match=why):
        llama()(tokens(1, 5), attention_mask=custom(kind))


def test_a_custom_padding_mask_is_taken_and_read_anew_each_time() -> None:
    model, ids = llama(), tokens(1, 5)
    mask = custom("float padding").clone()
    with torch.no_grad():
        plain = model(ids).logits
        assert torch.equal(model(ids, attention_mask=mask).logits, plain)
        mask[..., 3, 1] = -torch.inf  # in place: the same tensor, another mask
        changed = model(ids, attention_mask=mask).logits
    assert torch.equal(changed[:, :3], plain[:, :3])
    assert not torch.equal(changed[:, 3], plain[:, 3])


def test_a_float_mask_under_compile_is_refused(fresh_compiler: None) -> None:
    compiled = torch.compile(llama(), backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(Exception, match="must be bool under"):
        compiled(tokens(1, 5), attention_mask=custom("float padding"))


def test_a_mask_that_shows_a_later_key_is_refused_when_compiled_too(fresh_compiler: None) -> None:
    compiled = torch.compile(llama(), backend="aot_eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="lets a query see a later key"):
        compiled(tokens(1, 5), attention_mask=custom("future"))


def test_documents_given_by_cu_seq_lens_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="cu_seq_lens_q needs position_ids that restart"):
        llama()(tokens(1, 7), cu_seq_lens_q=torch.tensor([0, 3, 7]), cu_seq_lens_k=torch.tensor([0, 3, 7]))


def test_an_image_block_in_a_causal_model_is_refused() -> None:
    from transformers.masking_utils import create_causal_mask

    model = llama()
    embeddings = torch.zeros(1, 5, 48, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="see a later key"):
        create_causal_mask(model.config, embeddings, None, None, block_sequence_ids=torch.tensor([[-1, 0, 0, -1, -1]]))


def test_missing_and_multi_axis_positions() -> None:
    layer = llama().model.layers[0].self_attn
    q, k = torch.randn(1, 6, 2, 8), torch.randn(1, 6, 5, 8)
    visible = torch.ones(1, 1, 2, 5, dtype=torch.bool).tril(3)
    with pytest.raises(ValueError, match="LlamaAttention got no position_ids"):
        stablemask_attention(layer, q, k, k, visible)
    with pytest.raises(NotImplementedError, match=r"position_ids must be \(B, S\), got \(3, 1, 2\)"):
        stablemask_attention(layer, q, k, k, visible, position_ids=torch.zeros(3, 1, 2, dtype=torch.long))


def test_without_position_ids_a_plain_call_is_served() -> None:
    layer = llama().model.layers[0].self_attn
    q = torch.randn(1, 6, 5, 8)
    given, _ = stablemask_attention(layer, q, q, q, None, position_ids=torch.arange(5)[None])
    assert torch.equal(stablemask_attention(layer, q, q, q, None)[0], given)


def test_gpt2_is_served() -> None:
    config = GPT2Config(n_embd=24, n_layer=1, n_head=2, n_positions=32, vocab_size=61, initializer_range=0.3)
    model = model_of(config).float()
    ids = tokens(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, :4], model(ids[:, :4]).logits, rtol=1e-4, atol=1e-4)
        config.stablemask = {"gamma": 0.01}
        assert (model(ids).logits - model_of(config, "sdpa").float()(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "error", "why"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"steps": 1.5}, TypeError, "steps must be an int"),
        ({"steps": 5, "start": 0.0}, ValueError, "start"),
        ({"steps": 5, "target": [0.5, 0.0]}, ValueError, "target"),
    ],
)
def test_a_wrong_schedule(arguments: dict[str, Any], error: type, why: str) -> None:
    with pytest.raises(error, match=why):
        GammaSchedule(**arguments)


def begin(schedule: GammaSchedule, model: PreTrainedModel, step: int = 0) -> None:
    schedule.on_train_begin(None, SimpleNamespace(global_step=step), None, model=model)


def test_a_schedule_for_another_attention_or_another_gamma_is_refused() -> None:
    with pytest.raises(ValueError, match='needs a model with attn_implementation="stablemask" or "sm_flex", got \'sdpa\''):
        begin(GammaSchedule(5), model_of(CONFIGS["llama"](), "sdpa"))
    half: dict[str, Any] = {"stablemask": {"gamma": 0.5, "length": LENGTH}}
    with pytest.raises(ValueError, match=r"is 0.5 and the target .* 'headwise': pass target=0.5"):
        begin(GammaSchedule(5), llama(**half))
    begin(GammaSchedule(5, target=0.5), llama(**half))
    begin(GammaSchedule(5), llama(stablemask=None))
    begin(GammaSchedule(5), llama(stablemask={"gamma": GammaSchedule(5).gamma(3, 6, LENGTH), "length": LENGTH}), step=3)


def test_a_schedule_longer_than_the_training_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(schedule.logger, "warning", heard.append)
    for steps in (8, 9):
        GammaSchedule(steps).on_train_begin(None, SimpleNamespace(global_step=0, max_steps=8), None, model=llama(stablemask=None))
    assert [x for x in heard if x.startswith("Gamma")] == [
        "GammaSchedule takes 9 steps, the training 8: it ends before gamma is at its target"
    ]


def mean_share(gamma: float, length: int) -> float:
    """Of the pseudo scores of eq. 8 in a row of scores 0, over rows 0..N-1: summed column by column."""
    masses = [sum(math.exp(-j * gamma) for j in range(p + 1, length)) for p in range(length)]
    return sum(mass / (mass + p + 1) for p, mass in enumerate(masses)) / length


@pytest.mark.parametrize("length", [LENGTH, 96])
@pytest.mark.parametrize(("target", "targets"), [("headwise", [2**-4, 2**-8]), (0.3, [0.3, 0.3]), ([0.5, 1e-3], [0.5, 1e-3])])
def test_the_mean_pseudo_share_grows_linearly(length: int, target: Any, targets: list[float]) -> None:
    schedule = GammaSchedule(steps=10, target=target)
    assert schedule.gamma(0, 2, length) == [math.inf, math.inf]
    assert schedule.gamma(10, 2, length) == schedule.gamma(99, 2, length) == targets
    for head in range(2):
        last = mean_share(targets[head], length)
        for step in range(1, 10):
            assert mean_share(schedule.gamma(step, 2, length)[head], length) == pytest.approx(step / 10 * last, rel=1e-9)


def test_the_schedule_begins_causal_and_ends_at_its_target() -> None:
    schedule, model = GammaSchedule(steps=10), llama()
    begin(schedule, model)
    assert model.config.stablemask["gamma"] == [math.inf] * 6
    schedule.on_step_end(None, SimpleNamespace(global_step=10), None, model=model)  # the last step of ten
    assert model.config.stablemask["length"] == LENGTH
    assert model.config.stablemask["gamma"] == pytest.approx(schedule.gamma(10, 6))
