"""The remask kernel compiled ahead of time, and what its cubin says: registers, spills, instructions."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sm_flex.epilogue import kernel as rk

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# What only a sink with a value has: its level and its value.
VALUE_POINTERS = ("sink_ptr", "value_ptr")
POINTERS = (
    "out_ptr", "new_out_ptr", "lse_ptr", "new_lse_ptr", "table_ptr", "gamma_ptr", "position_ptr", "cu_ptr", *VALUE_POINTERS,
)  # fmt: skip
VALUE_STRIDES = ("sink_b", "sink_h", "sink_s", "value_h", "value_d")
# Where log M comes from: the kernel's constant for it, and the pointers that it needs.
SOURCES: dict[str, tuple[int, set[str]]] = {
    "table": (0, {"table_ptr"}),
    "arange": (rk.ARANGE, {"gamma_ptr"}),
    "positions": (rk.POSITIONS, {"gamma_ptr", "position_ptr"}),
    "cu_seqlens": (rk.CU_SEQLENS, {"gamma_ptr", "cu_ptr"}),
    "one doc.": (rk.CU_SEQLENS, {"gamma_ptr", "cu_ptr"}),
}


class Variant(NamedTuple):
    arch: int
    dtype: torch.dtype
    head_dim: int
    in_place: bool
    source: str
    has_value: bool = False

    @property
    def rows(self) -> int:
        """Of a tile."""
        return rk.block_shape(self.head_dim, self.dtype.itemsize)[0]


class Cubin(NamedTuple):
    """registers are per thread, spilled bytes per thread (stack and local memory), load and store bits per thread.

    instructions are a warp's that touches its tile, skipped those up to the first EXIT, where a warp leaves
    that skips its tile.
    """

    registers: int
    spilled: int
    load: int
    store: int
    instructions: int
    skipped: int


def compile_variant(variant: Variant) -> Cubin:
    """As a launch with contiguous tensors would specialise and run it."""
    asm = _compile(variant)
    return Cubin(*_resources(asm["cubin"]), *_widest(asm["ptx"]), *count(_sass(asm["cubin"])))


def _compile(variant: Variant) -> Any:
    rows, block_d = rk.block_shape(variant.head_dim, variant.dtype.itemsize)
    names = rk.remask_kernel.arg_names
    position, used = SOURCES[variant.source]
    constants = {
        "HEAD_DIM": variant.head_dim, "BLOCK_D": block_d, "ROWS": rows, "HALF_ULP": rk.HALF_ULP[variant.dtype],
        "IN_PLACE": variant.in_place, "HAS_TABLE": variant.source == "table", "POSITION": position,
        "HAS_VALUE": variant.has_value, "out_d": 1, "new_d": 1, "lse_s": 1, "nlse_s": 1, "table_s": 1, "position_s": 1,
    }  # fmt: skip
    if variant.has_value:
        # One level per head, expanded over batch and rows: such a 0 is a multiple of 16 to the launcher.
        constants |= {"sink_h": 1, "value_d": 1}
        used = used.union(VALUE_POINTERS)
    else:
        constants |= dict.fromkeys(VALUE_STRIDES, 1)  # as the launch has them
    types = dict.fromkeys(("lse_ptr", "new_lse_ptr", "table_ptr", "gamma_ptr", *VALUE_POINTERS), "*fp32")
    types |= {"out_ptr": TYPES[variant.dtype], "new_out_ptr": TYPES[variant.dtype], "position_ptr": "*i64", "cu_ptr": "*i32"}
    constants |= dict.fromkeys({"table_ptr", "gamma_ptr", "position_ptr", "cu_ptr", *VALUE_POINTERS} - used)
    if variant.source == "one doc.":
        constants["num_docs"] = 1  # the launcher specialises on 1
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    # The launcher sees such multiples in torch's tensors; without them the loads come out scalar.
    aligned = {"num_rows", "out_b", "out_h", "out_s", "new_b", "new_h", "new_s", "sink_b", "sink_s", "value_h", *POINTERS}
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned and name not in constants}
    source = ASTSource(rk.remask_kernel, signature, {(names.index(name),): x for name, x in constants.items()}, attrs)
    return triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options={"num_warps": rk.NUM_WARPS}).asm


def count(sass: str) -> tuple[int, int]:
    """The instructions of a listing, without the padding, and those up to the first EXIT."""
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    names = [name for name in names if name != "NOP"]
    if "EXIT" not in names:
        raise RuntimeError(f"cuobjdump listed no instructions:\n{sass[:500]}")
    return len(names), names.index("EXIT") + 1


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory."""
    text = _cuobjdump("--dump-resource-usage", cubin)
    found = {name: int(x) for name, x in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    if set(found) != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{text}")
    return found["REG"], found["STACK"] + found["LOCAL"]


def _sass(cubin: bytes) -> str:
    return _cuobjdump("--dump-sass", cubin)


def _cuobjdump(what: str, cubin: bytes) -> str:
    """By the cuobjdump that Triton bundles."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def _widest(ptx: str) -> tuple[int, int]:
    """The widest load and store of global memory, in bits per thread."""

    def widest(instruction: str) -> int:
        found = re.findall(rf"\b{instruction}\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
        return max(int(count or 1) * int(size) for count, size in found)

    return widest("ld"), widest("st")
