"""What torch.compile makes of a training step on CUDA, without a GPU: library calls, kernels and copies, ours and plain.

    python -m benchmarks.inductor_report [--only NAME ...] [--code]

Each case (cases.py) is compiled in a process of its own, for an H100 on paper (paper_gpu.py). The run fails
where StableMask copies a large tensor that the plain call does not, or keeps more of them (flex keeps one more, whose
own backward wants the out that StableMask replaces), or passes over one more often than the case allows.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.inductor_report.cases import CASES, LARGE, B, D, H, S
from benchmarks.inductor_report.paper_gpu import child, why_not

GRAPHS = ("forward", "backward")
# Passes over something as large as out, and large tensors kept, that a case may have beyond the plain call, in the forward
# and in the backward. The epilogue is one pass in the forward.
MORE_PASSES = {
    "flash, gamma learned": (1, 1),  # d log M needs rowsum(grad_out * out)
    "varlen, gamma learned": (1, 1),
    "flash, a gradient of lse": (1, 3),  # the columns of the gradient: grad_out, out, q, k and v
    "flex, a score_mod": (1, 1),  # the epilogue has a backward of its own
}
MORE_KEPT = {"flex, a score_mod": (1, 0)}
Readings = dict[str, list[dict[str, Any]]]


def run(name: str, folder: Path, code: bool = False) -> tuple[Readings, str]:
    """The readings of a case, {"StableMask": [forward, backward], "plain": ...}, and what its process printed."""
    command = [sys.executable, "-m", "benchmarks.inductor_report.child", name, *(["--code"] if code else [])]
    done = subprocess.run(command, cwd=report.ROOT, env=child(folder), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: the compile failed\n{done.stderr[-3000:]}")
    *printed, last = done.stdout.splitlines()
    return json.loads(last), "\n".join(printed)


def faults(name: str, readings: Readings) -> list[str]:
    """What StableMask does in a case and should not."""
    found = []
    for i, graph in enumerate(GRAPHS):
        ours, plain = readings["StableMask"][i], readings["plain"][i]
        allowed = {
            "copies": 0,
            "passes": MORE_PASSES.get(name, (1, 0))[i],
            "kept": MORE_KEPT.get(name, (0, 0))[i],
        }
        for what, more in allowed.items():
            if ours[what] > plain[what] + more:
                found.append(f"{name}, {graph}: {ours[what]} {what}, plain has {plain[what]}")
        if len(ours["calls"]) != len(plain["calls"]) and not name.startswith("flex"):
            found.append(f"{name}, {graph}: calls {ours['calls']}, plain calls {plain['calls']}")
    return found


def row_of(name: str, i: int, readings: Readings) -> tuple[object, ...]:
    ours, plain = readings["StableMask"][i], readings["plain"][i]
    pairs = [f"{len(ours['kernels'])} / {len(plain['kernels'])}"]
    pairs += [f"{ours[what]} / {plain[what]}" for what in ("passes", "copies", "kept")]
    calls = ", ".join(call.removeprefix("aten._scaled_dot_product_").removeprefix("torch_attn._") for call in ours["calls"])
    return (name, GRAPHS[i], calls, *pairs)


def main(argv: list[str] | None = None) -> int:
    parser = report.Parser("inductor_report", "What torch.compile makes of a training step on CUDA, without a GPU.")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="these cases (default: all)")
    parser.add_argument("--code", action="store_true", help="print Inductor's code")
    args = parser.parse(argv)
    reason = why_not()
    if reason is not None:
        parser.error(reason)
    with parser.refusing():
        result = report.Result(parser, args.out, "inductor_report", torch.device("cpu"))
    found: dict[str, Readings] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in tqdm(args.only, unit="case", dynamic_ncols=True):
            found[name], printed = run(name, Path(folder), args.code)
            if printed:
                print(printed)
    wrong = [fault for name, readings in found.items() for fault in faults(name, readings)]
    rows = [row_of(name, i, readings) for name, readings in found.items() for i in range(len(GRAPHS))]
    columns = ("case", "graph", "library calls", "kernels", "passes", "copies", "kept")
    notes = (
        f"Each figure is StableMask / plain. {'At fault: ' + '; '.join(wrong) + '.' if wrong else 'None is at fault.'} The step "
        f"is attention and the projection after it, bf16, B {B}, H {H}, S {S}, D {D}, forward and backward, compiled by Inductor "
        f"for an H100 that exists on paper; nothing was run. Large is {LARGE} elements, the size of out. kernels: launches of "
        "generated or our own kernels. passes: those that go over something large, library calls left out. copies: passes that "
        "write something large in another order, and copies between host and device. kept: large tensors that the graph makes "
        "and returns, for its caller or for the backward. BHSD: q, k and v are contiguous; elsewhere they lie as a linear layer "
        "leaves them."
    )
    record = {"columns": columns, "rows": rows, "faults": wrong, "readings": found}
    table = report.markdown_table(columns, rows)
    result.publish("What torch.compile makes of a training step on CUDA", table, notes, record, summary={"faults": len(wrong)})
    return 1 if wrong else 0
