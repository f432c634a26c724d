"""FSDP2 (`fully_shard`) and HSDP: each rank has some rows of every parameter, as the local part of a DTensor."""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from stacey_dist.sharding.fragment import Fragment, trainable_parameters, whole


def list_fragments(model: nn.Module, optimizer: Optimizer) -> Iterator[Fragment]:
    """Yield this rank's rows of each parameter: possibly none. In HSDP, ranks of other replica groups are replicas.

    Parameters that are gathered, as the root's are after an evaluation, are freed first.

    Raises NotImplementedError for a parameter that is split other than by rows over one mesh dimension.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for name, param in trainable_parameters(model):
        state = optimizer.state.get(param, {})
        if isinstance(param, DTensor):
            yield _rows(name, param, state)
        else:  # left out of the sharding
            yield whole(name, param, state, everywhere=True)


def shards(model: nn.Module) -> bool:
    """Return whether `fully_shard` was applied to some of the model, or its parameters are DTensors otherwise."""
    return any(isinstance(m, FSDPModule) for m in model.modules()) or any(
        isinstance(p, DTensor) for p in model.parameters()
    )


def refresh_weights(model: nn.Module, optimizer: Optimizer) -> None:
    """Do nothing: the optimizer updates the shards that the model gathers."""


def _rows(name: str, param: DTensor, state: dict[str, Any]) -> Fragment:
    """Return this rank's rows of a parameter. Raises NotImplementedError for other ways to place it."""
    mesh = param.device_mesh
    by_rows = all(type(p) is Replicate or p == Shard(0) for p in param.placements)
    if not by_rows or sum(p.is_shard() for p in param.placements) > 1:
        raise NotImplementedError(
            f"{name} is placed {param.placements}; supported are parameters sharded by rows, Shard(0), over one "
            "mesh dimension, and replicated over the others"
        )
    if mesh.size() != dist.get_world_size():
        raise NotImplementedError(
            f"{name} is placed on a mesh of {mesh.size()} of the {dist.get_world_size()} ranks; supported are meshes "
            "of all ranks"
        )
    first, last = 0, param.shape[0] if param.dim() else 1
    replica, replicas = 0, 1
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for placement, place, size in zip(param.placements, coordinate, mesh.shape, strict=True):
        if placement.is_shard():
            longest = -(-last // size)  # rows of the first ranks, as torch.chunk cuts them
            first, last = min(last, longest * place), min(last, longest * (place + 1))
        else:
            replica, replicas = replica * size + place, replicas * size
    row_size = param.shape[1:].numel()
    return Fragment(
        name=name,
        shape=param.shape,
        start=first * row_size,
        stop=last * row_size,
        weight=_local(param),
        state={key: _local(value) for key, value in state.items() if key != "step" and isinstance(value, DTensor)},
        step=state.get("step"),
        owner=param,
        replica=replica,
        replicas=replicas,
    )


def _local(tensor: DTensor) -> Tensor:
    return tensor.to_local().detach()
