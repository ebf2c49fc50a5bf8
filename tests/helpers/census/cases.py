"""One model type under the attentions that the census compares, and the calls that it is asked to serve."""

import copy
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.helpers.census.configs import small_config
from tests.helpers.census.probes import RECORD, Float64
from tests.helpers.transformers_models import LENGTH, ragged, tokens

TOO_LARGE = 20_000_000  # parameters
# What config.stablemask["gamma"] is under an attention of the census. Under any other there is no config.stablemask.
GAMMAS: dict[str, Any] = {"stablemask": "headwise", "oracle": "headwise", "causal": float("inf"), "causal oracle": float("inf")}
NAMES = {"causal": "stablemask", "causal oracle": "oracle"}  # under which Transformers knows them, where it is another
CACHES = ("cache", "past_key_values", "cache_params")  # the names that a cache has had


class NotBuilt(Exception):
    """The type does not build small, or does not run with its own attention."""


class NoSuchCall(Exception):
    """The type has no such call: its forward does not take what the call is made of."""


class Case:
    """The same small model, weights and all, under one attention or another, in float64."""

    def __init__(self, model_type: str) -> None:
        self.config, self.model_class = small_config(model_type)
        with torch.device("meta"):
            size = sum(p.numel() for p in self.model_class._from_config(copy.deepcopy(self.config)).parameters())
        if size > TOO_LARGE:
            raise NotBuilt(f"{size:,} parameters")
        self.models: dict[str, PreTrainedModel] = {}
        self.state: dict[str, Tensor] | None = None
        self.names = inspect.signature(self.model_class.forward).parameters
        errors = []
        for self.stock in ("eager", "sdpa"):  # the formula as the type has it, before what a kernel may leave out
            try:
                self.logits(self.stock, tokens(2, 5), use_cache=False)
                self.state = self.models[self.stock].state_dict()
                return
            except Exception as error:
                self.models.clear()
                errors.append(f"{self.stock}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        raise NotBuilt("; ".join(dict.fromkeys(errors)))

    def model(self, attention: str) -> PreTrainedModel:
        """attention: its name; "causal" is stablemask at gamma = inf, and "causal oracle" eq. 11 there."""
        if attention not in self.models:
            self.models[attention] = self._build(attention)
        return self.models[attention]

    def _build(self, attention: str) -> PreTrainedModel:
        config: Any = copy.deepcopy(self.config)
        if attention in GAMMAS:  # of a composite model as of any other: on the config that the model is built from
            config.stablemask = {"gamma": GAMMAS[attention], "length": LENGTH}
            attention = NAMES.get(attention, attention)
        torch.manual_seed(0)
        model = self.model_class._from_config(
            config, attn_implementation=attention, experts_implementation="eager", dtype=torch.float64
        )
        model = model.double().eval()
        if self.state is not None:
            model.load_state_dict(self.state)
            return model
        # Weights large enough that attention matters, and no two logits tie.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.25)
        return model

    def takes(self, name: str) -> bool:
        return name in self.names

    def call(self, attention: str, ids: Tensor, **given: Any) -> Any:
        model = self.model(attention)
        RECORD.position_ids = given.get("position_ids")
        with torch.no_grad(), Float64():
            return model(ids, **{name: value for name, value in given.items() if self.takes(name)})

    def logits(self, attention: str, ids: Tensor, **given: Any) -> Tensor:
        """Logits, or the last hidden states of a model without a head."""
        out = self.call(attention, ids, **given)
        return out["logits"] if "logits" in out else out["last_hidden_state"]

    def chunks(self, attention: str, ids: Tensor, sizes: list[int]) -> Tensor:
        cache, parts = {}, []
        for part in ids.split(sizes, dim=1):
            out = self.call(attention, part, use_cache=True, **cache)
            found = [name for name in CACHES if self.takes(name) and out.get(name) is not None]
            if not found:
                raise NoSuchCall("it has no cache")
            cache = {found[0]: out[found[0]]}
            parts.append(out["logits"] if "logits" in out else out["last_hidden_state"])
        return torch.cat(parts, 1)

    def generated(self, attention: str, inputs: dict[str, Tensor], new: int) -> Tensor:
        """The logits of each step of generate(), and the tokens as one more column."""
        model: Any = self.model(attention)
        if not hasattr(model, "generate"):
            raise NoSuchCall("it does not generate")
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        options = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
        with Float64():
            out = model.generate(**given, **options, max_new_tokens=new, min_new_tokens=new)
        ids = out.sequences[:, inputs["input_ids"].shape[1] :]
        return torch.cat([torch.stack(out.logits, 1), ids[..., None]], -1)

    def greedy(self, attention: str, prompt: Tensor, new: int) -> Tensor:
        """The same step by step, each a full pass of the whole prefix without a cache."""
        ids, steps = prompt, []
        for _ in range(new):
            logits = self.logits(attention, ids, use_cache=False)[:, -1:]
            ids = torch.cat([ids, logits.argmax(-1)], 1)
            steps.append(torch.cat([logits, ids[:, -1:, None]], -1))
        return torch.cat(steps, 1)


class Call(NamedTuple):
    """The same rows twice, each by the name of the attention that serves them."""

    run: Callable[[str], Tensor]  # the call in question
    alone: Callable[[str], Tensor]  # plain full passes of each sequence by itself
    kept: Callable[[str], Tensor]  # the call in which Transformers itself keeps the sequences apart, if it does


def _call(run: Callable[[str], Tensor], alone: Callable[[str], Tensor]) -> Call:
    return Call(run, alone, run)


def full_pass(case: Case) -> Call:
    ids = tokens(2, LENGTH + 4)  # section 4.3's rows beyond N too
    return Call(*3 * [lambda attention: case.logits(attention, ids, use_cache=False)])


def left_padding(case: Case) -> Call:
    if not case.takes("attention_mask"):
        raise NoSuchCall("its forward takes no attention_mask")
    prompts, inputs = ragged([13, 5, 9], "left")
    real, ids = inputs["attention_mask"].bool(), inputs.pop("input_ids")
    return _call(
        lambda attention: case.logits(attention, ids, use_cache=False, **inputs)[real],
        lambda attention: torch.cat([case.logits(attention, prompt, use_cache=False)[0] for prompt in prompts]),
    )


def cached_chunks(case: Case) -> Call:
    ids = tokens(2, LENGTH + 4)
    return _call(
        lambda attention: case.chunks(attention, ids, [4, 9, 1, 8, 1, 4]),
        lambda attention: case.logits(attention, ids, use_cache=False),
    )


def packing(case: Case, **options: Any) -> Call:
    if not case.takes("position_ids"):
        raise NoSuchCall("its forward takes no position_ids")
    documents = [tokens(1, n) for n in (5, 11, 3)]
    ids, positions = torch.cat(documents, 1), torch.cat([torch.arange(n) for n in (5, 11, 3)])[None]
    return Call(
        lambda attention: case.logits(attention, ids, position_ids=positions, **options),
        lambda attention: torch.cat([case.logits(attention, x, use_cache=False) for x in documents], 1),
        lambda attention: case.logits(attention, ids, position_ids=positions, use_cache=False),
    )


def generation(case: Case) -> Call:
    prompts, inputs = ragged([LENGTH - 3, 14], "left")
    return _call(
        lambda attention: case.generated(attention, inputs, 5),
        lambda attention: torch.cat([case.greedy(attention, prompt, 5) for prompt in prompts]),
    )


CALLS: dict[str, Callable[[Case], Call]] = {
    "full pass": full_pass,
    "left padding": left_padding,
    "cached chunks": cached_chunks,
    "packing": lambda case: packing(case, use_cache=False),
    "packing, cache": packing,  # which a forward makes by default
    "generation": generation,
}
