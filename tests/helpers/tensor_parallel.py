"""Small models under Transformers' tensor parallelism, for test_tensor_parallel.py: what each of two processes gets."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import sm_flex_transformers  # noqa: F401  (registers stablemask)


def load(path: str, **options: Any) -> Any:
    """float64, which the experts have in eager alone."""
    options = {"attn_implementation": "stablemask", "experts_implementation": "eager", "dtype": torch.float64, **options}
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def results(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """The logits, every parameter's gradient of a fixed function of them, and tokens that were generated."""
    logits = model(ids, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    grads = {name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():  # where Transformers takes another path
        generated = model.generate(ids[:1, :7], max_new_tokens=4, do_sample=False, pad_token_id=0)
    return {"logits": _whole(logits).detach(), "generated": generated, **grads}


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # pyright: ignore[reportAttributeAccessIssue]


def rank_main(rank: int, folder: str, jobs: dict[str, dict[str, Any]]) -> None:
    """One of two processes: FOLDER/<rank>.pt has for each job's name its results, or the words that it was refused in.

    A job is {"path", "ids"}, and "plan" where it is not the model's own.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for name, job in jobs.items():
        model = load(job["path"], distributed_config=DistributedConfig(tp_size=2, tp_plan=job.get("plan", "auto")))
        try:
            found[name] = results(model, job["ids"])
        except (ValueError, NotImplementedError) as error:  # on both alike, or one would wait for the other
            found[name] = str(error)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
