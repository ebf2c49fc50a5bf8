"""What an issue report needs: the versions, the devices, and which engine serves typical calls here.

    python -m sm_flex

Computes nothing and downloads nothing.
"""

import argparse
import importlib.metadata
import importlib.util
import platform

import torch

from sm_flex import __version__
from sm_flex.engines import Need
from sm_flex.engines.choose import choose

PACKAGES = ("triton", "transformers", "torchtitan")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
PACKED = "packed documents"
CALLS = ("causal", "attn_mask", "block_mask", "inner score_mod", "dropout", PACKED)


def version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # triton of a ROCm build has a name of its own
        return "installed"


def versions() -> dict[str, str]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    return {
        "sm_flex": __version__,
        "python": f"{platform.python_version()}, {platform.platform()}",
        "torch": f"{torch.__version__}, built for {build}",
        **{package: version(package) for package in PACKAGES},
    }


def devices() -> dict[str, str]:
    """The CPU, and each device of the accelerator that torch finds."""
    found = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type != "cuda":
        found[accelerator.type] = f"{torch.accelerator.device_count()} of them"
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
    return found


def engine_for(call: str, dtype: torch.dtype, device: str) -> str:
    """The engine that the library's own rule picks for one of CALLS in training, 8 heads, head dim 64."""
    if device == "mps" and dtype == torch.float64:
        return "no such dtype"
    if call == PACKED:
        q = torch.empty(256, 8, 64, dtype=dtype, device=device, requires_grad=True)
        return choose(Need(q, q, q, packed=True))
    q = torch.empty(1, 8, 256, 64, dtype=dtype, device=device, requires_grad=True)
    attn_mask = torch.empty(1, 1, 256, 256, dtype=torch.bool, device=device) if call == "attn_mask" else None
    need = Need(q, q, q, attn_mask, score_mod=call == "inner score_mod", block_mask=call == "block_mask")
    return choose(need._replace(dropout_p=0.1 if call == "dropout" else 0.0))


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def report() -> str:
    parts = [table(list(versions().items())), table(list(devices().items()))]
    for device in list(devices())[:2]:  # the CPU and the first accelerator
        header = (f"engines on {device}", *(str(dtype).removeprefix("torch.") for dtype in DTYPES))
        parts.append(table([header, *((call, *(engine_for(call, dtype, device) for dtype in DTYPES)) for call in CALLS)]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m sm_flex", description="Versions, devices, and which engine serves here.").parse_args()
    print(report())
