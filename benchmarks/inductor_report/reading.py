"""What a compiled graph does, read off Inductor's code: library calls, kernels, copies, and what it keeps."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.inductor_report.paper_gpu import Graph


class Reading(NamedTuple):
    """Of one graph. large: as many elements as the attention's output, or more.

    calls: of libraries' kernels, and flex's, by name. kernels: all launches of generated or our own kernels, by name.
    passes: those of them that go over something large. copies: of them those that write it in another order,
    and copies between devices. kept: how many large tensors that the graph made it returns.
    """

    calls: list[str]
    kernels: list[str]
    passes: int
    copies: int
    kept: int

    def record(self) -> dict[str, Any]:
        return self._asdict()


def read(graph: Graph, large: int) -> Reading:
    body = body_of(graph.code)
    launches = [(name, _elements(arguments)) for name, arguments in re.findall(r"\b(\w+)\.run\((.*)\)", body)]
    flex = [name for name, _ in launches if name.startswith("triton_tem_")]
    launches = [(name, elements) for name, elements in launches if name not in flex]
    ours = [name for name, _ in launches if name.startswith("remask_kernel")]
    passes = [name for name, elements in launches if elements >= large and name not in ours]
    moved = [name for name in passes if "clone" in name]
    between = re.findall(r"\.copy_\(", body)
    calls = re.findall(r"\b(?:torch\.ops\.|extern_kernels\.)([\w.]+?)(?:\.default)?\(", body)
    calls = [name for name in calls if "assert" not in name]
    calls += ["flex_attention_backward" if "flex_attention_backward" in name else "flex_attention" for name in flex]
    kept = {name for name, size in zip(_returned(body), graph.outputs, strict=True) if size >= large and name.startswith("buf")}
    return Reading(calls, [name for name, _ in launches], len(passes) + len(ours), len(moved) + len(between), len(kept))


def body_of(code: str) -> str:
    """The call() of a module that Inductor wrote."""
    start = max(code.find("def call(self"), code.find("def call("))
    end = code.find("\nrunner = ", start)
    return code[start:] if end < 0 else code[start:end]


def _returned(body: str) -> Sequence[str]:
    """The buffer behind each output."""
    (line,) = re.findall(r"^\s*return \((.*)\)\s*$", body, re.MULTILINE)[-1:]
    parts, depth = [""], 0
    for letter in line:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    names = [part.strip().removeprefix("reinterpret_tensor(").split(",")[0] for part in parts]
    return [name for name in names if name]


def _elements(arguments: str) -> int:
    """How many elements a launch goes over: its last arguments before the stream are the lengths of its loops."""
    found = []
    for argument in reversed([x.strip() for x in arguments.split(",") if "=" not in x]):
        if not argument.isdigit():
            break
        found.append(int(argument))
    return math.prod(found)
