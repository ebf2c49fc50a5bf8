"""Which rows belong together, and where each is: gaps behind padding, packed documents, rows that a model drops."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma4TextConfig, LlamaConfig, PersimmonConfig, PreTrainedModel

from tests.helpers.transformers_models import COMMON, CONFIGS, VOCABULARY, agree, model_of, ragged, tokens

ROPE = 1e-5  # Transformers keeps RoPE's angles in float32


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    return model(ids, **inputs).logits


def padded(pads: int, positions: list[int], pad: int = 0) -> dict[str, Tensor]:
    """A row of len(positions) tokens behind so many pads."""
    count = len(positions)
    ids = torch.tensor([[0] * pads + list(range(5, 5 + count))])
    mask, where = torch.tensor([[0] * pads + [1] * count]), torch.tensor([[pad] * pads + positions])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": where}


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kept", [[0, 3, 4, 9], [0, 1, 5, 6], [2, 3, 4, 5]])
def test_positions_with_gaps_are_taken_at_their_word_behind_any_padding(kept: list[int], cache: bool) -> None:
    """What a prompt compressor kept: a token that happens to be at its slot says nothing of the row."""
    model = model_of(LlamaConfig(**COMMON))
    far = logits(model, use_cache=cache, **renamed(padded(11, kept)))[:, 11:]
    for pads in range(8):
        if pads == kept[0] and kept == list(range(pads, pads + 4)):
            continue  # all at their slots: Transformers' default, and the test below
        agree(logits(model, use_cache=cache, **renamed(padded(pads, kept)))[:, pads:], far)


def renamed(inputs: dict[str, Tensor]) -> dict[str, Any]:
    return {"ids": inputs["input_ids"], **{name: x for name, x in inputs.items() if name != "input_ids"}}


def test_a_row_all_of_whose_tokens_are_at_their_slots_is_counted_from_its_first_token() -> None:
    model = model_of(LlamaConfig(**COMMON))
    alone = logits(model, torch.tensor([[5, 6, 7, 8]]))
    for pads in (1, 2, 5):
        agree(logits(model, **renamed(padded(pads, list(range(pads, pads + 4)))))[:, pads:], alone, ROPE)


def test_each_row_of_a_batch_is_judged_by_itself() -> None:
    model = model_of(LlamaConfig(**COMMON))
    rows = [padded(2, [0, 3, 4, 9]), padded(3, [3, 4, 5]), padded(0, [0, 1, 2, 3, 4, 5])]
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    together = logits(model, **renamed(batch))
    for i, row in enumerate(rows):
        real = row["attention_mask"][0].bool()
        agree(together[i][real], logits(model, **renamed(row))[0][real])


DOCUMENTS = {
    "from 0": [0, 1, 2, 0, 1, 2, 3],
    "the second continued at 7": [0, 1, 2, 7, 8, 9, 10],
    "both from 2": [2, 3, 4, 2, 3, 4, 5],
    "one token each": [0, 0, 4, 5, 6, 0, 0],
}


def split(positions: list[int]) -> list[slice]:
    starts = [i for i in range(len(positions)) if i == 0 or positions[i] != positions[i - 1] + 1]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(positions)], strict=True)]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox"])
@pytest.mark.parametrize("documents", list(DOCUMENTS))
@pytest.mark.parametrize("cache", [False, True])
def test_packed_documents_that_start_anywhere_stay_apart(name: str, documents: str, cache: bool) -> None:
    """A restart is any position that is not its predecessor + 1, as Transformers has it without a cache."""
    positions = DOCUMENTS[documents]
    model, ids, where = model_of(CONFIGS[name]()), tokens(1, len(positions)), torch.tensor([positions])
    packed = logits(model, ids, position_ids=where, use_cache=cache)
    for part in split(positions):
        agree(packed[:, part], logits(model, ids[:, part], position_ids=where[:, part], use_cache=False), ROPE)


@pytest.mark.parametrize("cache", [False, True])
def test_documents_beside_padding_stay_apart(cache: bool) -> None:
    model, ids = model_of(CONFIGS["llama"]()), tokens(2, 9)
    where = torch.tensor([[0, 0, 0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]])
    packed = logits(model, ids, attention_mask=mask, position_ids=where, use_cache=cache)
    for row, part in ((0, slice(2, 5)), (0, slice(5, 9)), (1, slice(0, 4)), (1, slice(4, 7))):
        agree(packed[row, part], logits(model, ids[row : row + 1, part])[0], ROPE)


def test_gaps_are_no_documents_where_an_attention_mask_of_ones_is_given() -> None:
    """With a 2-D mask Transformers takes a row for one sequence: the same row, with pads and without, alone and in a batch."""
    model, kept = model_of(LlamaConfig(**COMMON)), [0, 3, 4, 9]
    ones = logits(model, **renamed(padded(0, kept)))
    agree(ones, logits(model, **renamed(padded(3, kept)))[:, 3:])
    without = padded(0, kept)
    del without["attention_mask"]
    assert (logits(model, **renamed(without)) - ones).abs().max() > 1e-3


def test_a_model_that_keeps_its_positions_to_itself_is_refused_where_they_matter() -> None:
    """Persimmon hands its attention no position_ids: packed rows look like one sequence there."""
    model = model_of(PersimmonConfig(**COMMON))
    ids = tokens(1, 7)
    agree(logits(model, ids, position_ids=torch.arange(7)[None]), logits(model, ids))
    with pytest.raises(
        ValueError, match="PersimmonAttention got no position_ids, and this call has a mask, a cache or positions"
    ):
        logits(model, ids, position_ids=torch.tensor([DOCUMENTS["from 0"]]))
    agree(logits(model, ids), logits(model, ids, use_cache=False))  # and the next plain call is served
    with torch.no_grad(), pytest.raises(ValueError, match="PersimmonAttention got no position_ids"):
        model.model(ids, None, torch.tensor([DOCUMENTS["from 0"]]))  # by its place among the arguments


def test_and_when_it_is_compiled(fresh_compiler: None) -> None:
    model = model_of(PersimmonConfig(**COMMON)).model
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for call in (
            lambda where: compiled(input_ids=tokens(1, 7), position_ids=where),
            lambda where: compiled(tokens(1, 7), None, where),
        ):
            with pytest.raises(Exception, match="PersimmonAttention got no position_ids"):
                call(torch.tensor([DOCUMENTS["from 0"]]))


def test_gaps_are_those_of_their_own_forward_when_a_layer_runs_again() -> None:
    """Gradient checkpointing: the layers run again in the backward, after another forward without a mask."""
    inputs = renamed(padded(0, [0, 3, 4, 9]))
    grads = []
    for checkpointing in (False, True):
        model = model_of(LlamaConfig(**COMMON)).train()
        if checkpointing:
            newer = getattr(model, "activation_checkpointing_enable", None)  # the newer name
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": True})
            model.enable_input_require_grads()
        loss = model(inputs["ids"], **{k: v for k, v in inputs.items() if k != "ids"}, use_cache=False).logits.square().sum()
        model(tokens(1, 4), use_cache=False)
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    agree(grads[1], grads[0])


def test_threads_do_not_hear_of_each_other() -> None:
    """One model in several threads, with and without a mask of ones, on positions with gaps."""
    model, kept = model_of(LlamaConfig(**COMMON)), padded(0, [0, 3, 4, 9])

    def call(masked: bool) -> Tensor:
        inputs = renamed(kept)
        inputs["position_ids"] = inputs["position_ids"].clone()
        if not masked:
            del inputs["attention_mask"]
        return logits(model, **inputs)

    right = [call(False), call(True)]
    assert (right[0] - right[1]).abs().max() > 1e-3
    with ThreadPoolExecutor(4) as pool:
        for i, out in enumerate(pool.map(call, [i % 2 == 1 for i in range(60)])):
            agree(out, right[i % 2])


def gemma4() -> PreTrainedModel:
    sizes: dict[str, Any] = {
        **COMMON, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "sliding_window": 5,
        "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }  # fmt: skip
    return model_of(Gemma4TextConfig(**sizes))


@pytest.mark.parametrize("keep", [0, 1, 3])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kind", ["plain", "left", "left, default positions", "packed"])
def test_rows_dropped_before_layers_with_shared_keys_change_nothing(kind: str, cache: bool, keep: int) -> None:
    """Gemma 4 drops all rows but the last before them, and slices its mask, but not its position_ids."""
    model = gemma4()
    if kind == "plain":
        inputs: dict[str, Any] = {"ids": tokens(2, 9)}
    elif kind == "packed":
        inputs = {"ids": tokens(1, 9), "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])}
    else:
        inputs = renamed(ragged([9, 4, 6], "left")[1])
        if "default" in kind:
            del inputs["position_ids"]
    expected = logits(gemma4_without_dropping(model), use_cache=False, **inputs)
    agree(logits(model, use_cache=cache, logits_to_keep=keep, **inputs)[:, -3:], expected[:, -(keep or 9) :][:, -3:])


def gemma4_without_dropping(model: PreTrainedModel) -> Any:
    """The same model, told to return its hidden states, which it does only where it keeps all rows."""
    return lambda ids, **inputs: model(ids, output_hidden_states=True, **inputs)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_gemma4_with_shared_keys_generates(cache: str) -> None:
    prompts, inputs = ragged([9, 4, 6], "left")
    model = gemma4()
    together = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8, do_sample=False,
        cache_implementation=cache,
    )[:, 9:]  # fmt: skip
    for row, prompt in enumerate(prompts):
        for i in range(8):  # step by step, without a cache
            step = gemma4_without_dropping(model)
            so_far = torch.cat([prompt, together[row : row + 1, :i]], 1)
            assert logits(step, so_far, use_cache=False)[0, -1].argmax() == together[row, i]
