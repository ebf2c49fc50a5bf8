"""One case, in a process that has a GPU on paper: its readings as the last line of what it prints."""

import json
import sys

from benchmarks.inductor_report.cases import CASES, LARGE, steps
from benchmarks.inductor_report.paper_gpu import compile_step
from benchmarks.inductor_report.reading import read


def main(name: str, show: bool) -> None:
    found = {}
    for who, (fn, inputs) in steps(CASES[name]).items():
        graphs = compile_step(fn, inputs)
        if show:
            print(*(graph.code for graph in graphs), sep="\n\n")
        found[who] = [read(graph, LARGE).record() for graph in graphs]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], "--code" in sys.argv)
