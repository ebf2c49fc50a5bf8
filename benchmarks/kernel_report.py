"""What the compiler makes of the remask kernel, ahead of time, for three GPU generations, without a GPU.

    python -m benchmarks.kernel_report

Each variant is compiled to a cubin as a launch with contiguous tensors would specialise it; registers, local
memory and stack come from the cubin itself. Any spill (local memory or stack) fails the run.
"""

import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import report
from sm_flex.epilogue import kernel as rk

TARGETS = (80, 90, 100)
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
POINTERS = ("out_ptr", "new_out_ptr", "lse_ptr", "new_lse_ptr", "table_ptr", "gamma_ptr", "position_ptr", "cu_ptr")
# Where log M comes from: the kernel's constant for it, and the pointers that it needs.
SOURCES: dict[str, tuple[int, set[str]]] = {
    "table": (0, {"table_ptr"}),
    "arange": (rk.ARANGE, {"gamma_ptr"}),
    "positions": (rk.POSITIONS, {"gamma_ptr", "position_ptr"}),
    "cu_seqlens": (rk.CU_SEQLENS, {"gamma_ptr", "cu_ptr"}),
    "one doc.": (rk.CU_SEQLENS, {"gamma_ptr", "cu_ptr"}),
}


def compile_variant(arch: int, dtype: torch.dtype, head_dim: int, in_place: bool, source: str) -> Any:
    """The cubin and the ptx of one variant of remask_kernel for sm_<arch>, by these names."""
    rows, block_d = rk.block_shape(head_dim, dtype.itemsize)
    names = rk.remask_kernel.arg_names
    position, used = SOURCES[source]
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "ROWS": rows, "HALF_ULP": rk.HALF_ULP[dtype], "IN_PLACE": in_place,
        "HAS_TABLE": source == "table", "POSITION": position,
        "out_d": 1, "new_d": 1, "lse_s": 1, "nlse_s": 1, "table_s": 1, "position_s": 1,
    }  # fmt: skip
    types = {"lse_ptr": "*fp32", "new_lse_ptr": "*fp32", "table_ptr": "*fp32", "gamma_ptr": "*fp32"}
    types |= {"out_ptr": TYPES[dtype], "new_out_ptr": TYPES[dtype], "position_ptr": "*i64", "cu_ptr": "*i32"}
    constants |= dict.fromkeys({"table_ptr", "gamma_ptr", "position_ptr", "cu_ptr"} - used)
    if source == "one doc.":
        constants["num_docs"] = 1  # the launcher specialises on 1
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    # The launcher sees such multiples in torch's tensors; without them the loads come out scalar.
    aligned = {"num_rows", "out_b", "out_h", "out_s", "new_b", "new_h", "new_s", *POINTERS}
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned and name not in constants}
    kernel = triton.compile(
        ASTSource(rk.remask_kernel, signature, {(names.index(name),): x for name, x in constants.items()}, attrs),
        target=GPUTarget("cuda", arch, 32),
    )
    return kernel.asm


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of the cubin's kernel, by the cuobjdump that Triton bundles."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(x) for name, x in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    if set(found) != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{text}")
    return found


def bits(ptx: str) -> tuple[int, int]:
    """The widest load and store of global memory, in bits per thread."""

    def widest(instruction: str) -> int:
        found = re.findall(rf"\b{instruction}\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
        return max(int(count or 1) * int(size) for count, size in found)

    return widest("ld"), widest("st")


def main(argv: list[str] | None = None) -> int:
    parser = report.Parser("kernel_report", "What the compiler makes of the kernel.")
    args = parser.parse(argv)
    with parser.refusing():
        result = report.Result(parser, args.out, "kernel_report", torch.device("cpu"))
    rows, spilled = [], 0
    variants = list(product(TARGETS, TYPES, (64, 128), (True, False), SOURCES))
    for arch, dtype, head_dim, in_place, source in tqdm(variants, unit="variant", dynamic_ncols=True):
        asm = compile_variant(arch, dtype, head_dim, in_place, source)
        used, widest = resources(asm["cubin"]), bits(asm["ptx"])
        spilled += used["LOCAL"] + used["STACK"] > 0
        where = "in place" if in_place else "new buffer"
        figures = (used["REG"], used["STACK"], used["LOCAL"], *widest)
        rows.append((f"sm_{arch}", str(dtype)[6:], head_dim, where, source, *figures))
    columns = ("target", "dtype", "head_dim", "out", "log M from", "registers", "stack", "local", "widest load", "widest store")
    verdict = "No variant spills." if not spilled else f"{spilled} variants spill."
    notes = (
        f"{verdict} Registers are per thread, stack and local memory bytes per thread (both 0: no spill), loads and stores bits "
        "per thread in one instruction. Compiled ahead of time, as for a launch with contiguous tensors; nothing was run."
    )
    record, table = {"columns": columns, "rows": rows, "spilled": spilled}, report.markdown_table(columns, rows)
    result.publish("What the compiler makes of the remask kernel", table, notes, record, summary={"spilled": spilled})
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
