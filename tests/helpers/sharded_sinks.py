"""A small model with learned sinks under FSDP2, for test_learned_sinks.py: what each of two processes gets."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from sm_flex_transformers import learn_sinks
from tests.helpers.sink_models import setting, with_sinks
from tests.helpers.transformers_models import tokens


def model_with_sinks() -> Any:
    torch.manual_seed(0)
    return with_sinks(setting("layers", "layers by key heads", gamma="headwise"))


def sharded(model: Any, size: int) -> Any:
    mesh = init_device_mesh("cpu", (size,))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return model


def train(model: Any, ids: torch.Tensor) -> None:
    """Two steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()


def rank_main(rank: int, folder: str) -> None:
    """One of two processes, with a row of its own. FOLDER/trained.pt has all weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = model_with_sinks()
    learn_sinks(model)
    model.gradient_checkpointing_enable()
    train(sharded(model.train(), 2), tokens(2, 9)[rank : rank + 1])
    whole = {name: x.full_tensor() for name, x in model.state_dict().items()}  # by both together
    if rank == 0:
        torch.save(whole, Path(folder) / "trained.pt")
        model.save_pretrained(Path(folder) / "saved", state_dict=whole)
    dist.barrier()
    dist.destroy_process_group()
