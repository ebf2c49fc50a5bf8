"""Sinks as parameters of a model's attention layers: trained, and written into the config when the model is saved.

The weights that are saved do not hold them: Transformers drops what a model class does not know, and vLLM refuses it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sm_flex_transformers import settings, sharding
from sm_flex_transformers.carried import LEVEL, VALUE
from sm_flex_transformers.look import calls

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def learn_sinks(model: PreTrainedModel) -> list[nn.Parameter]:
    """Makes the sinks of config.stablemask parameters of the model's attention layers, in the dtype of its weights.

    ``layer.self_attn.stablemask_sink`` is (H,), ``stablemask_sink_value`` as it stands in the config, (H, Dv) or (Hkv, Dv). The
    layers take their sinks from there. ``save_pretrained`` writes them back into the config, and leaves them out of the weights;
    ``from_pretrained`` then has them in the config, and learn_sinks() makes them parameters again. Call it before an optimizer,
    PEFT, DDP or FSDP is given the model: those would not see them.

    Returns:
        The parameters, for an optimizer that is to treat them apart.

    Raises:
        ValueError: config.stablemask has no "sink", or the model has them as parameters already, or FSDP has sharded it.
        NotImplementedError: the model's weights are sharded by tensor parallelism.
    """
    config: Any = model.config.get_text_config()
    given = settings.of(config) or {}
    if given.get("sink") is None:
        raise ValueError('config.stablemask has no "sink" that could be learned: give it one, or call absorb_sinks(model, texts)')
    if parameters(model):
        raise ValueError("the model's sinks are parameters already")
    _check_not_fsdp(model)
    made = []
    for layer, module in _attention_layers(model).items():
        if sharding.place(module)[1] > 1:
            raise NotImplementedError(
                "learned sinks need the whole of a layer's heads on each process, and tensor parallelism shards them: use FSDP "
                "(fully_shard, after learn_sinks), or leave the sinks fixed"
            )
        asked = settings.read(config, layer, torch.device("cpu"))
        if asked is None or asked.sink is None:
            continue
        like = next(module.parameters())
        heads = settings.num_heads(config, layer)
        for name, x in ((LEVEL, asked.sink.expand(heads)), (VALUE, asked.sink_value)):
            if x is not None:
                module.register_parameter(name, nn.Parameter(x.to(like.device, like.dtype, copy=True)))
                made.append(getattr(module, name))
    return made


def _check_not_fsdp(model: nn.Module) -> None:
    """A parameter that comes after FSDP gets the gradient of its own process alone, and the processes drift apart."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()):
        raise ValueError("FSDP has sharded this model, and would not see new parameters: call learn_sinks before it")


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """By name, the sinks that are parameters of a model."""
    return {name: x for name, x in model.named_parameters() if name.rpartition(".")[2] in (LEVEL, VALUE)}


def before_save(model: Any, state_dict: dict[str, Any] | None) -> None:
    """Writes learned sinks into the config, from state_dict where it holds them, and keeps them out of the weights."""
    found = parameters(model)
    if not found:
        return
    config: Any = model.config.get_text_config()
    given, layers = settings.of(config) or {}, config.num_hidden_layers
    made: dict[str, list[Any]] = {LEVEL: [None] * layers, VALUE: [None] * layers}
    saved = state_dict or {}
    for name, x in found.items():
        owner, _, kind = name.rpartition(".")
        x = saved.get(name, saved.get(_unwrapped(name), x))
        made[kind][model.get_submodule(owner).layer_idx] = _whole(x).tolist()
    changed = {**given, "sink": made[LEVEL]}
    if any(x is not None for x in made[VALUE]):
        changed["sink_value"] = made[VALUE]
    config.stablemask = changed
    if settings.of(model.config) is not None:
        model.config.stablemask = changed
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *found, *map(_unwrapped, found)}


def _unwrapped(name: str) -> str:
    """A parameter's name in a state dict, which leaves out the wrappers of FSDP and of activation checkpoints."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _whole(x: Any) -> Tensor:
    x = x.full_tensor() if hasattr(x, "full_tensor") else x
    return x.detach().double().cpu()


@torch.no_grad()
def _attention_layers(model: Any) -> dict[int, nn.Module]:
    """By number, the modules that call the model's attention: found by a forward of two tokens."""
    found: dict[int, nn.Module] = {}

    def note(attention: calls.Attention, module: Any, *args: Any, **kwargs: Any) -> Any:
        found.setdefault(module.layer_idx, module)
        return attention(module, *args, **kwargs)

    ids = torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    with calls.evaluating(model), calls.around_attention(note):
        model(input_ids=ids, use_cache=False)
    return found
