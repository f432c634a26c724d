"""Tell which engine shards a model, from its parameters and optimizer, and call that engine's adapter."""

from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from stacey_dist.errors import SettingsError
from stacey_dist.optim.memory import local
from stacey_dist.sharding import deepspeed, torch_engines
from stacey_dist.sharding.fragment import Fragment
from stacey_dist.sharding.unsupported import refuse_unsupported, wrapped


def fragments(model: nn.Module, optimizer: Any, accelerator: Any = None, *, empty: bool = False) -> list[Fragment]:
    """Return the parts of all trainable parameters that live on this rank, with their optimizer state.

    Over the ranks of a shard group the fragments tile every trainable parameter: each element once, no padding.

    Args:
        model: the model, or what DDP, DeepSpeed, `fully_shard` or `Accelerator.prepare` have made of it.
        optimizer: the optimizer that these have made of it, or given back.
        accelerator: the Accelerator that prepared both, if one did.
        empty: list the empty shards too, which FSDP2 keeps state for.

    Raises:
        RuntimeError: the accelerator was launched to shard the model, but the model is not sharded.
        NotImplementedError: a way to shard that is not supported; the message names it.
        SettingsError: the optimizer updates parameters that are not the model's.
    """
    optimizer = _engine_optimizer(optimizer)
    adapter = _adapter(model, optimizer)
    if accelerator is not None:
        _check_launched_engine(accelerator, adapter, model)
    found = [f for f in adapter.list_fragments(model, optimizer) if empty or f.stop > f.start]
    # Now that FSDP2 has resharded parameters that it had gathered, they are the model's.
    _refuse_foreign_parameters(model, optimizer, adapter)
    return found


def refresh_weights(model: nn.Module, optimizer: Any) -> None:
    """Make the model compute with weights that were written into fragments. All ranks call it together."""
    optimizer = _engine_optimizer(optimizer)
    _adapter(model, optimizer).refresh_weights(optimizer)


def base_optimizer(optimizer: Any) -> Optimizer:
    """Return the optimizer inside an engine's wrappers, which updates this rank's tensors and has their state."""
    *_, innermost = wrapped(optimizer)
    return innermost


def state_bytes(optimizer: Any) -> int:
    """Return the bytes of the optimizer's state tensors on this rank, with padding and without step counts."""
    storages = {}
    for state in base_optimizer(optimizer).state.values():
        for key, value in state.items():
            if key != "step" and isinstance(value, Tensor):
                storage = local(value).untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _engine_optimizer(optimizer: Any) -> Any:
    """Return the engine's optimizer without Accelerate's wrapper."""
    while type(optimizer).__module__.startswith("accelerate."):
        optimizer = optimizer.optimizer
    return optimizer


def _adapter(model: nn.Module, optimizer: Any) -> ModuleType:
    """Return the module for the engine that has the model. Raises as `refuse_unsupported` does."""
    refuse_unsupported(model, optimizer)
    params = list(model.parameters())
    by_deepspeed = any(type(made).__module__.startswith("deepspeed.") for made in (model, optimizer))
    if by_deepspeed or any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in params):
        return deepspeed
    return torch_engines


def _refuse_foreign_parameters(model: nn.Module, optimizer: Any, adapter: ModuleType) -> None:
    """Raise SettingsError if the optimizer updates parameters that the model lacks: their state would be lost."""
    if adapter is deepspeed:
        groups = getattr(optimizer, "bit16_groups", None) or getattr(optimizer, "fp16_groups", None) or []
    else:
        groups = [group["params"] for group in base_optimizer(optimizer).param_groups]
    known = {id(param) for param in model.parameters()}
    foreign = [param for params in groups for param in params if id(param) not in known]
    if foreign:
        shape = tuple(getattr(foreign[0], "ds_shape", foreign[0].shape))
        raise SettingsError(
            f"the optimizer updates {len(foreign)} parameters that are not the model's, the first of shape {shape}; "
            "give a model that holds all of them, or an optimizer of this model's parameters alone"
        )


def _check_launched_engine(accelerator: Any, adapter: ModuleType, model: nn.Module) -> None:
    launched = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    came_up = {"DEEPSPEED": adapter is deepspeed, "FSDP": adapter is torch_engines and torch_engines.shards(model)}
    if not came_up.get(launched, True):
        raise RuntimeError(
            f"Accelerate was launched for {launched}, but the model is not sharded by it; "
            "pass the objects that Accelerator.prepare returned"
        )
