"""Compile the remask kernel ahead of time for three GPU generations, without a GPU, and report what the compiler made of it.

    python -m benchmarks.kernel_report

Each variant is compiled to a cubin as a launch with contiguous tensors would specialise it; registers, local memory and
stack come from the cubin itself. Any spill (local memory or stack) fails the run.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sm_flex import remask_kernel as rk

TARGETS = (80, 90, 100)
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
POINTERS = ("out_ptr", "new_out_ptr", "lse_ptr", "new_lse_ptr", "table_ptr", "gamma_ptr", "position_ptr", "cu_ptr")
SOURCES = {"table": None, "arange": rk.ARANGE, "positions": rk.POSITIONS, "cu_seqlens": rk.CU_SEQLENS, "one doc.": rk.CU_SEQLENS}


def compile_variant(arch: int, dtype: torch.dtype, head_dim: int, in_place: bool, source: str) -> bytes:
    """The cubin of one variant of remask_kernel for sm_<arch>."""
    rows, block_d = rk.block_shape(head_dim, dtype.itemsize)
    names = rk.remask_kernel.arg_names
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "ROWS": rows, "HALF_ULP": rk.HALF_ULP[dtype], "IN_PLACE": in_place,
        "HAS_TABLE": source == "table", "POSITION": SOURCES[source] or 0,
        "out_d": 1, "new_d": 1, "lse_s": 1, "nlse_s": 1, "table_s": 1, "position_s": 1,
    }  # fmt: skip
    types = {"lse_ptr": "*fp32", "new_lse_ptr": "*fp32", "table_ptr": "*fp32", "gamma_ptr": "*fp32"}
    types |= {"out_ptr": TYPES[dtype], "new_out_ptr": TYPES[dtype], "position_ptr": "*i64", "cu_ptr": "*i32"}
    unused = {"table": ("gamma_ptr", "position_ptr", "cu_ptr"), "arange": ("table_ptr", "position_ptr", "cu_ptr")}
    unused |= {
        "positions": ("table_ptr", "cu_ptr"),
        "cu_seqlens": ("table_ptr", "position_ptr"),
        "one doc.": ("table_ptr", "position_ptr"),
    }
    constants |= dict.fromkeys(unused[source])
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
    return kernel.asm["cubin"]


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


def main() -> int:
    print(f"remask_kernel, triton {triton.__version__}: registers a thread, stack and local bytes")
    spilled = 0
    for arch in TARGETS:
        for dtype in TYPES:
            for head_dim in (64, 128):
                for in_place in (True, False):
                    for source in SOURCES:
                        used = resources(compile_variant(arch, dtype, head_dim, in_place, source))
                        spills = used["LOCAL"] + used["STACK"]
                        spilled += spills > 0
                        print(
                            f"sm_{arch} {str(dtype)[6:]:8} D={head_dim:<3} {'in place' if in_place else 'new buf.'} {source:10} "
                            f"REG {used['REG']:3} STACK {used['STACK']} LOCAL {used['LOCAL']}{'  SPILLS' if spills else ''}"
                        )
    print("no spills" if not spilled else f"{spilled} variants spill")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
