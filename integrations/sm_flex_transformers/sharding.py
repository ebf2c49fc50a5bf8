"""Tensor parallelism: a rank's layer has some of the heads, and wants the gammas of those."""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

_NARROWED = WeakIdKeyDictionary()  # gammas of all heads: by (rank, ranks), those of the rank's own
_CHECKED = WeakIdKeyDictionary()  # models whose plan was looked at


def of_own_heads(module: nn.Module, gamma: Tensor, num_heads: int, keep: bool) -> Tensor:
    """gamma (H,) of all the layer's heads, cut to those of this rank's queries: contiguous, the first rank has the first.

    keep lets the calls of a layer share one tensor.

    Raises:
        ValueError: the layer's weights do not say which heads these are.
    """
    if gamma.dim() == 0 or gamma.shape[0] == num_heads:
        return gamma
    rank, size = place(module)
    if num_heads * size != gamma.shape[0]:
        raise ValueError(
            f"{type(module).__name__} has {num_heads} query heads where its config says {gamma.shape[0]}, and its weights are "
            f"{'not sharded' if size == 1 else f'shared by {size} ranks'}: stablemask cannot tell which heads these are"
        )
    own = gamma.narrow(0, rank * num_heads, num_heads)
    if not keep:
        return own
    known: Any = _NARROWED.setdefault(gamma, {})
    if (rank, size) not in known:
        with torch.inference_mode(False):
            known[rank, size] = own.clone()  # a view would keep gamma, and itself, for ever
    return known[rank, size]


def place(module: nn.Module) -> tuple[int, int]:
    """This rank's place among those that share a layer's weights, and their number; (0, 1) where no weight is sharded.

    Raises:
        NotImplementedError: the layer's weights are not all sharded over the same ranks.
    """
    found = {place for parameter in module.parameters() for place in _shards(parameter)}
    if len(found) > 1:
        raise NotImplementedError(
            f"the weights of {type(module).__name__} are sharded over several groups of ranks: stablemask takes one, as tp_plan "
            "makes it"
        )
    return next(iter(found), (0, 1))


def _shards(weight: Any) -> list[tuple[int, int]]:
    """(rank, ranks) along each dimension of the mesh that a weight is sharded over."""
    if not hasattr(weight, "device_mesh"):  # a DTensor has one, and torch may be built without those
        return []
    mesh, split = weight.device_mesh, [dim for dim, way in enumerate(weight.placements) if not way.is_replicate()]
    return [(mesh.get_local_rank(dim), mesh.size(dim)) for dim in split if mesh.size(dim) > 1]


def check_plan(model: PreTrainedModel) -> None:
    """Refuses a tp_plan that cuts through a head, before the first forward stumbles on it. Looks once at a model.

    Raises:
        ValueError: naming the projection, its heads and the ranks.
    """
    if torch.compiler.is_compiling() or (getattr(model, "_tp_size", None) or 1) == 1 or model in _CHECKED:
        return
    for name, module in model.named_modules():
        head_dim: Any = getattr(module, "head_dim", None)
        if not isinstance(head_dim, int):
            continue
        own: dict[str, Any] = {
            part: module.get_submodule(part) for part in ("q_proj", "k_proj", "v_proj") if hasattr(module, part)
        }
        split = [part for part in own if _style(model, f"{name}.{part}") == "colwise"]
        for part in split:
            rows = own[part].weight.shape[0]
            if rows % head_dim == 0 and any(rows // head_dim % size for _, size in _shards(own[part].weight)):
                raise ValueError(
                    f"tp_plan cannot share out the heads of {name}.{part}, {rows // head_dim} in all, among {model._tp_size} "
                    "ranks: take a tp_size that divides them"
                )
        if split == ["q_proj"] and own["k_proj"].weight.shape[0] > head_dim:
            raise ValueError(
                f"tp_plan shards {name}.q_proj and not its k_proj and v_proj: a rank's queries would meet other heads' keys"
            )
    _CHECKED[model] = True


def _style(model: PreTrainedModel, name: str) -> str | None:
    return (model.tp_plan or {}).get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
