"""Requests without a wrong one: every law of sm_flex.testing, over every entry point and engine, in every dtype.

    python -m benchmarks.fuzz --max-examples 10000          # a few minutes on one core

Laws are stated in sm_flex/testing/laws.py, the ways in are those of entry_points.py. A law is held against several calls of one
request; the requests are split evenly over laws, ways in and dtypes. A wrong one is printed as code, shrunk, and the exit code
is 1.
"""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.fuzz.entry_points import CPU_PATHS, CUDA_PATHS
from sm_flex.testing.conformance import Result, plan, search

CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Search(NamedTuple):
    path: str
    dtype: torch.dtype
    result: Result


def run(max_examples: int, seed: int, device: str) -> list[Search]:
    """Every law on every way in, in every dtype, by max_examples requests or a few more; a way in may refuse some."""
    cuda = device.startswith("cuda")
    paths, dtypes = (CUDA_PATHS, CUDA_DTYPES) if cuda else (CPU_PATHS, CPU_DTYPES)
    plans = [
        (path, dtype, step)
        for path, fn in paths.items()
        for dtype in dtypes
        for step in plan(fn, grads=True, dtype=dtype, device=device)
    ]
    each = -(-max_examples // sum(not why_not for *_, (_, _, _, why_not) in plans))
    done = []
    for i, (path, dtype, (name, law, requests, why_not)) in enumerate(tqdm(plans, unit="law", dynamic_ncols=True)):
        result = Result(name, "not run", why=why_not)
        if not why_not:
            result = search(name, law, paths[path], requests, each, seed + i)
        if result.status == "failed":
            tqdm.write(f"{path}, {dtype}: {result}\n\n{result.code}\n")
        done.append(Search(path, dtype, result))
    return done


def table(done: list[Search]) -> str:
    rows = []
    for path in dict.fromkeys(x.path for x in done):
        results = [x.result for x in done if x.path == path]
        not_run = sorted({x.law for x in results if x.status == "not run"})
        rows.append(
            (path, sum(x.problems for x in results), sum(x.refused for x in results), _wrong(results), ", ".join(not_run))
        )
    return report.markdown_table(("way in, engine", "requests", "refused", "laws broken", "laws not run"), rows)


def _wrong(results: list[Result]) -> int:
    return sum(result.status == "failed" for result in results)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.Parser(prog="python -m benchmarks.fuzz", description="Requests without a wrong one.")
    parser.add_argument("--max-examples", type=int, default=1000, help="requests drawn in all (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which requests (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--out", type=Path, default=report.OUT, help="folder for the results (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        report.at_least("--max-examples", args.max_examples, 1)
        if args.device not in ("cpu", "cuda") or (args.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"--device must be cpu, or cuda where there is one, got {args.device}")
        device = torch.device(args.device)
        stem = report.result_stem(report.out_folder(args.out), "fuzz", device)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    source = report.environment(shlex.join(["python", "-m", "benchmarks.fuzz", *argv]), device)
    start = time.perf_counter()
    done = run(args.max_examples, args.seed, args.device)
    seconds = time.perf_counter() - start
    results = [x.result for x in done]
    requests, wrong = sum(x.problems for x in results), _wrong(results)
    laws: list[dict[str, Any]] = [
        {"path": x.path, "dtype": str(x.dtype), "law": x.result.law, "status": x.result.status, "requests": x.result.problems,
         "refused": x.result.refused, "why": x.result.why, "code": x.result.code}
        for x in done
    ]  # fmt: skip
    record = {"benchmark": "fuzz", "requests": requests, "wrong": wrong, "seconds": round(seconds, 1), "laws": laws}
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(x.dtype for x in done))
    notes = (
        f"{requests} requests in {seconds:.0f} s, {wrong} laws broken; {dtypes}. A request counts where its law was decided; a "
        "refused one, where the way in raised NotImplementedError, does not. Laws: sm_flex/testing/laws.py."
    )
    codes = [f"\n```python\n# {x.path}\n{x.result.code}\n```" for x in done if x.result.status == "failed"]
    report.write(stem, "Requests without a wrong one", source, table(done), notes + "".join(codes), record)
    print(table(done))
    print(f"{requests} requests, {wrong} laws broken; wrote {stem}.md and .json")
    print(json.dumps({name: x for name, x in record.items() if name != "laws"}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
