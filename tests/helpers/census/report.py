"""The outcomes of a census in words: counts with every name that is not right, and a table."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import transformers

from tests.helpers.census.cases import CALLS
from tests.helpers.census.judge import NO_SUCH_CALL, NOT_BUILT, REFUSED, RIGHT, SAME_CALL, WRONG, Outcome

Census = dict[str, dict[str, Outcome]]  # model type: call: outcome


def revive(found: Mapping[str, Mapping[str, Sequence[str]]]) -> Census:
    """From the plain data that a test report carries."""
    return {name: {call: Outcome(*outcome) for call, outcome in calls.items()} for name, calls in found.items()}


def verdict(outcomes: dict[str, Outcome]) -> str:
    """Of a type as a whole: wrong where one call is, right where its full pass is, whatever other calls it refuses."""
    verdicts = [outcome.verdict for outcome in outcomes.values()]
    return WRONG if WRONG in verdicts else outcomes["full pass"].verdict


def lines(census: Census) -> list[str]:
    """One line for each outcome."""
    types, refusals, unbuilt = defaultdict(list), defaultdict(list), defaultdict(list)
    partly = defaultdict(list)
    for name, outcomes in census.items():
        kind = verdict(outcomes)
        types[kind].append(name)
        if kind == REFUSED:
            refusals[outcomes["full pass"].reason].append(name)
        elif kind == NOT_BUILT:
            unbuilt[outcomes["full pass"].reason].append(name)
        elif kind == RIGHT:
            for reason in {outcome.reason for outcome in outcomes.values() if outcome.verdict == REFUSED}:
                partly[reason].append(name)
    count = len({name for names in partly.values() for name in names})
    said = [f"{len(census)} model types, transformers {transformers.__version__}"]
    said.append(f"{RIGHT}: {len(types[RIGHT])}, of which {count} refuse some calls")
    mixed = [call for calls in census.values() for call, outcome in calls.items() if outcome.reason.endswith(SAME_CALL)]
    said += [f"{RIGHT}{SAME_CALL}: {call}: {mixed.count(call)}" for call in CALLS if call in mixed]
    said += [f"{RIGHT}, some calls refused ({reason}): {len(names)}: {', '.join(names)}" for reason, names in partly.items()]
    said += [f"{REFUSED} ({reason}): {len(names)}: {', '.join(names)}" for reason, names in refusals.items()]
    said += [f"{NOT_BUILT}: {', '.join(names)}: {reason}" for reason, names in unbuilt.items()]
    said += [f"{NO_SUCH_CALL}: {len(types[NO_SUCH_CALL])}: {', '.join(types[NO_SUCH_CALL])}"] * bool(types[NO_SUCH_CALL])
    said += [f"{WRONG}: {name}: {call}: {outcome.reason}"
             for name in types[WRONG] for call, outcome in census[name].items() if outcome.verdict == WRONG]  # fmt: skip
    return said


def markdown(census: Census) -> str:
    """One row for each type, one column for each call; what a cell says beyond its verdict is in brackets."""
    rows = [["model type", *CALLS], ["---"] * (1 + len(CALLS))]
    for name, outcomes in census.items():
        cells = []
        for outcome in outcomes.values():
            reason = " ".join(outcome.reason.split()).replace("|", "\\|")
            cells.append(outcome.verdict if outcome.verdict == RIGHT else f"{outcome.verdict} ({reason})")
        rows.append([name, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
