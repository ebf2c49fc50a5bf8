"""The model as it is, with each mass switched on and nothing trained."""

from typing import Any

from benchmarks.cure.model import Mass, set_mass
from benchmarks.cure.sinks import Sinks

LABELS = {
    "causal": "causal",
    "headwise": "head-wise",
    "gamma-0.5": "gamma = 0.5",
    "shares": "gammas of the sinks' shares",
    "mass": "mass",
    "mass-value": "mass with value",
}


def masses(sinks: Sinks) -> dict[str, Mass]:
    return {
        "causal": Mass(), "headwise": Mass("headwise"), "gamma-0.5": Mass(0.5), "shares": Mass(sinks.gamma_LH),
        "mass": Mass(sink_LH=sinks.level_LH), "mass-value": Mass(sink_LH=sinks.level_LH, value_LKD=sinks.value_LKD),
    }  # fmt: skip


def switch(model: Any, sinks: Sinks, name: str, length: int) -> None:
    set_mass(model, masses(sinks)[name], length)
