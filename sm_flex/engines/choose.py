"""Which engine serves a call. The choice follows from what the call needs, never from another one's failure.

BACKEND AUTO takes the first line that fits the call. The figure is the fact that the line rests on, and
benchmarks.speed its source.

device  call                                 engine and the figure behind it
CUDA    options of torch's flex kernels, an  flex: the only one that takes them
        inner score_mod, a block_mask
CUDA    bf16, fp16, fp32                     flash, cuDNN or efficient: what torch's scaled_dot_product_attention takes, whose
                                             order, limits and sdpa_kernel() contexts hold here too; not
                                             measured yet
CUDA    packed, bf16 and fp16                varlen: not measured yet, and the only one that takes them
CPU     all that PyTorch's flash op takes    cpu: at S = 1k the formula of the paper takes 5.6 times as long
        (dispatch.py sends a long chunk against more keys to cpu_chunks: half of a bias's time)
CPU     packed                               varlen_cpu: the same op, for one document or one block of a window after another
any     everything else: other devices,      dense: the only one that takes them
        float64 on CUDA; on a CPU score_mods,
        block masks and dropout; a few queries
        whose value has its own head dim, in
        float32 and float64 (cpu.py)
"""

import torch

from sm_flex.engines import Engine, Need, cpu, cudnn, dense, efficient, flash, flex, varlen, varlen_cpu
from sm_flex.engines.torch_choice import can_use, enabled, torchs_engine

ENGINES: dict[str, Engine] = {
    "flash": flash,
    "cudnn": cudnn,
    "efficient": efficient,
    "cpu": cpu,
    "varlen": varlen,
    "varlen_cpu": varlen_cpu,
    "flex": flex,
    "dense": dense,
}
# What kernel_options={"BACKEND": ...} may name: the kernels of scaled_dot_product_attention, and torch flex's
# own.
SDPA_BACKENDS = {"FLASH_ATTENTION": "flash", "CUDNN_ATTENTION": "cudnn", "EFFICIENT_ATTENTION": "efficient", "MATH": "dense"}
FLEX_BACKENDS = ("TRITON", "TRITON_DECODE", "FLASH")
BACKENDS = ("AUTO", *SDPA_BACKENDS, *FLEX_BACKENDS)


def choose(need: Need) -> str:
    """The name of the engine: the first candidate that does not refuse the call.

    Raises:
        ValueError: the backend is not known.
        NotImplementedError, RuntimeError: no engine that was asked for serves the call.
    """
    if need.backend not in BACKENDS:
        raise ValueError(f"BACKEND must be one of {', '.join(BACKENDS)}, got {need.backend!r}")
    why = None
    for name in candidates(need):
        why = ENGINES[name].refuses(need)
        if why is None and need.backend != "AUTO" and not _torch_takes(name, need):
            why = "torch's kernel does not take this device, dtype, shape or mask"
        if why is None:
            return name
    if need.backend != "AUTO":
        raise NotImplementedError(f"BACKEND {need.backend} cannot serve this call: {why}. Leave it at AUTO")
    if need.flex_options:
        raise NotImplementedError(
            f"kernel_options other than BACKEND, and max_scores, need torch's flex kernels: {why}. Leave them out"
        )
    raise RuntimeError("No available kernel: sdpa_kernel() allows neither FLASH_ATTENTION for this call nor MATH")


def candidates(need: Need) -> list[str]:
    """The engines that may serve the call, best first: one where it is named."""
    if need.backend in FLEX_BACKENDS or (need.flex_options and need.backend == "AUTO"):
        return ["flex"]
    if need.backend != "AUTO":
        on_cpu = need.backend == "FLASH_ATTENTION" and need.device == "cpu"
        return ["cpu" if on_cpu else SDPA_BACKENDS[need.backend]]
    if need.packed:
        return ["varlen", "varlen_cpu", "dense"]
    if need.score_mod or need.block_mask:
        return ["flex", "dense"]
    if need.empty:
        return ["dense"]
    if need.device == "cpu":
        backends = {"cpu": "FLASH_ATTENTION", "dense": "MATH"}
        if cpu.copies_outweigh(need):
            backends = {"dense": "MATH", "cpu": "FLASH_ATTENTION"}
        return [name for name, backend in backends.items() if enabled(backend)]
    if need.device == "cuda" and torch.version.hip is None:
        choice = torchs_engine(need)
        # flash can give lse its gradient for head dims where cuDNN cannot.
        instead = ["flash"] if choice == "cudnn" and enabled("FLASH_ATTENTION") else []
        return [choice, *instead, "dense"]
    return ["dense"]


def _torch_takes(name: str, need: Need) -> bool:
    """What torch itself says of a kernel. Under torch.compile the kernel says no when it is traced."""
    if name not in ("flash", "cudnn", "efficient") or torch.compiler.is_compiling():
        return True
    return can_use(name, need.q, need.k, need.v, need.attn_mask, need.dropout_p)
