"""The judgement of one model type: each call is right, refused in true words, or wrong."""

import re
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from tests.helpers.census.cases import CALLS, Call, Case, NoSuchCall
from tests.helpers.census.probes import RECORD

RIGHT, REFUSED, NOT_BUILT, NO_SUCH_CALL, WRONG = "right", "refused", "not built", "no such call", "WRONG"
SAME_CALL = ", against the same call: its own attention mixes the sequences too"
EXACT = 1e-9
TEETH = 1e-3  # what StableMask must move the logits by, at least
BEHIND = ("deepseek_v4",)  # keys of their own stand behind the others: no oracle that goes by slots
KEPT = 1e-6  # a call in which the type's own attention is further off does not keep the sequences apart


class Outcome(NamedTuple):
    verdict: str
    reason: str = ""


def _asked(by: str, *names: str) -> bool:
    """A layer of that class was handed one of these keywords."""
    return any(name in call.keywords and type(call.module).__name__ == by for call in RECORD.calls for name in names)


def _own_positions() -> bool:
    """The model was called with positions that are not 0..S-1."""
    given = RECORD.position_ids
    return given is not None and not given.equal(torch.arange(given.shape[1])[None])


def _unplaced(by: str) -> bool:
    """A layer of that class was given no position_ids, in a call with a mask, a cache, or positions of its own."""
    mine = [call for call in RECORD.calls if type(call.module).__name__ == by and "position_ids" not in call.keywords]
    return any(_own_positions() or call.mask is not None or call.num_keys != call.num_queries for call in mine)


def _never_asks(name: str, case: Case) -> bool:
    """No call came from within a module of that class; the whole model is meant where the name is that of a model type."""
    whole = case.models.get("recorder")  # None: its own table of attentions knows no name but its own
    parts = [] if whole is None else [part for part in whole.modules() if type(part).__name__ == name]
    within = {id(x) for part in parts or filter(None, [whole]) for x in part.modules()}
    return not any(id(call.module) in within for call in RECORD.calls)


def _not_causal(name: str) -> bool:
    """A layer of that class looked its attention up and said that it is not causal."""
    mine = [call for call in RECORD.calls if type(call.module).__name__ == name]
    return any(not call.keywords.get("is_causal", getattr(call.module, "is_causal", True)) for call in mine)


def _shows_later_keys() -> bool:
    """Of the slots behind the queries' own."""
    masks = [call.mask for call in RECORD.calls if call.mask is not None and call.mask.shape[-1] == call.num_keys]
    seen = [x if x.dtype == torch.bool else x > torch.finfo(x.dtype).min for x in masks]
    return any(x.triu(x.shape[-1] - x.shape[-2] + 1).any() for x in seen)


def _not_causal(by: str) -> bool:
    mine = [call for call in RECORD.calls if type(call.module).__name__ == by]
    return any(not call.keywords.get("is_causal", getattr(call.module, "is_causal", True)) for call in mine)


def _several_axes() -> bool:
    return any(call.keywords["position_ids"].dim() != 2 for call in RECORD.calls if "position_ids" in call.keywords)


# What we may say, and whether it is true of what the same call handed the recorder: a name, the words, the check.
REFUSALS: list[tuple[str, str, Callable[[re.Match[str], Case], Any]]] = [
    ("never looks its attention up", r"(\S+) models do not use Transformers' attention interface",
     lambda said, case: _never_asks(said[1], case)),
    ("a bias of another form", r"(\w+) has a bias on the scores \((\w+)\)", lambda said, _: _asked(said[1], said[2])),
    ("an unknown keyword", r"(\w+) hands its attention (\w+)=", lambda said, _: _asked(said[1], said[2])),
    ("keys chosen across documents", r"(\w+) selects keys by itself and was not told of the packed documents in the row",
     lambda said, _: _asked(said[1], "indices", "block_indices") and _own_positions()),
    ("documents with a cache, no position_ids", r"(\w+) is handed no position_ids and was not told of the packed documents",
     lambda said, _: _own_positions() and not _asked(said[1], "position_ids")),
    ("no position_ids", r"(\w+) got no position_ids, and this call has a mask, a cache or positions of its own",
     lambda said, _: _unplaced(said[1])),
    ("several position axes", r"position_ids must be \(B, S\)", lambda *_: _several_axes()),
    ("a layer that is not causal", r"\w+ is causal and (\w+) is not", lambda said, _: _not_causal(said[1])),
    ("a mask that shows later keys", r"the attention mask lets a query see a later key", lambda *_: _shows_later_keys()),
    ("asks for a bidirectional mask", r"(?:stablemask|sm_flex) is causal and this model asks for a bidirectional mask",
     lambda *_: RECORD.bidirectional),
    ("a layer that is not causal", r"(?:stablemask|sm_flex) is causal and (\w+) is not", lambda said, _: _not_causal(said[1])),
]  # fmt: skip


def judge_type(model_type: str, attention: str = "stablemask") -> dict[str, Outcome]:
    """Outcome of each kind of call under "stablemask", or under "sm_flex" without a config.stablemask."""
    level = logging.get_verbosity()
    logging.set_verbosity(50)  # critical
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                case = Case(model_type)
            except Exception as error:
                return dict.fromkeys(CALLS, Outcome(NOT_BUILT, _said(error)))
            return {kind: judge(case, kind, attention) for kind in CALLS}
    finally:
        logging.set_verbosity(level)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def judge(case: Case, kind: str, attention: str) -> Outcome:
    torch.manual_seed(1)
    try:
        call = CALLS[kind](case)
        call.run(case.stock)
    except NoSuchCall as error:
        return Outcome(NO_SUCH_CALL, str(error))
    except Exception as error:
        return Outcome(NO_SUCH_CALL, f"with its own attention: {_said(error)}")
    try:
        actual = call.run(attention)
    except Exception as error:
        return refusal(case, call, error)
    return compare(case, kind, call, actual, attention)


def refusal(case: Case, call: Call, error: Exception) -> Outcome:
    said = _said(error)
    ours = "/sm_flex" in traceback.extract_tb(error.__traceback__)[-1].filename
    if not (ours and isinstance(error, (TypeError, ValueError, NotImplementedError))):
        return Outcome(WRONG, f"not our exception: {said}")
    RECORD.clear()
    try:
        call.run("recorder")
    except KeyError as other:  # a table of attentions of the model's own, which knows none of ours
        if other.args != ("recorder",):
            raise
    except Exception as other:
        return Outcome(WRONG, f"refused, and the recorder stops: {_said(other)}: {said}")
    for name, pattern, true in REFUSALS:
        if found := re.match(pattern, str(error)):
            return Outcome(REFUSED, name) if true(found, case) else Outcome(WRONG, f"untrue words: {said}")
    return Outcome(WRONG, f"unknown words: {said}")


def compare(case: Case, kind: str, call: Call, actual: Tensor, attention: str) -> Outcome:
    """actual against eq. 11 in plain full passes of each sequence; in the same call where Transformers mixes the sequences.

    Under sm_flex eq. 11 is at gamma = inf, and the model's own attention itself.
    """
    ours = attention == "sm_flex"
    reference = case.stock if case.config.model_type in BEHIND else "causal oracle" if ours else "oracle"
    try:
        stock, same_call, alone = call.run(case.stock), call.run(reference), call.alone(reference)
        kept = distance(call.kept(case.stock), call.alone(case.stock)) < KEPT
        numbers = {"off eq. 11": distance(actual, alone if kept else same_call)}
        wrong = numbers["off eq. 11"] > EXACT
        if kind == "full pass":
            numbers["gamma = inf off its own attention"] = distance(actual if ours else call.run("causal"), stock)
            wrong |= numbers["gamma = inf off its own attention"] > EXACT
            if not ours:
                numbers["moved by"] = distance(actual, stock)
                wrong |= numbers["moved by"] < TEETH
    except Exception as error:
        return Outcome(WRONG, f"served, but the oracle stops: {_said(error)}")
    said = ", ".join(f"{name} {number:.1e}" for name, number in numbers.items()) + ("" if kept else SAME_CALL)
    if kind == "full pass" and (names := bypassing(case, call)):
        return Outcome(WRONG, f"{said}, {', '.join(names)} never asked for the attention")
    return Outcome(WRONG if wrong else RIGHT, said)


def bypassing(case: Case, call: Call) -> list[str]:
    """Classes of the attention modules that ran without a call of the attention function."""
    model, ran = case.model("recorder"), []
    hooks = [
        module.register_forward_pre_hook(lambda module, _: ran.append(module))
        for module in model.modules()
        if re.search(r"Attention$", type(module).__name__) and not re.search(r"Linear|Lightning|Delta", type(module).__name__)
    ]
    RECORD.clear()
    call.run("recorder")
    for hook in hooks:
        hook.remove()
    asked = {id(part) for seen in RECORD.calls for part in seen.module.modules()}
    return sorted({type(x).__name__ for x in ran if not any(id(part) in asked for part in x.modules())})


def distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return (a - b).abs().double().max().nan_to_num(float("inf"), float("inf")).item()
