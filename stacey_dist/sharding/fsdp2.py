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
    mesh, coordinate = param.device_mesh, param.device_mesh.get_coordinate()
    assert coordinate is not None
    sharded = [dim for dim, placement in enumerate(param.placements) if placement.is_shard()]
    by_rows = len(sharded) <= 1 and all(type(p) is Replicate or p == Shard(0) for p in param.placements)
    if not by_rows:
        raise NotImplementedError(
            f"{name} is placed {param.placements}; supported are parameters sharded by rows, Shard(0), over one "
            "mesh dimension, and replicated over the others"
        )
    if mesh.size() != dist.get_world_size():
        raise NotImplementedError(
            f"{name} is placed on a mesh of {mesh.size()} of the {dist.get_world_size()} ranks; supported are meshes "
            "of all ranks"
        )
    rows = param.shape[0] if param.dim() else 1
    row_size = param.shape[1:].numel()
    first, local_rows = 0, rows
    if sharded:
        # The first ranks have ceil(rows / ranks) rows each, as torch.chunk cuts them.
        longest = -(-rows // mesh.size(sharded[0]))
        first = min(rows, longest * coordinate[sharded[0]])
        local_rows = min(rows, first + longest) - first
    replica, replicas = 0, 1
    for dim, placement in enumerate(param.placements):
        if placement.is_replicate():
            replica, replicas = replica * mesh.size(dim) + coordinate[dim], replicas * mesh.size(dim)
    tensors = {key: _local(value) for key, value in state.items() if key != "step" and isinstance(value, DTensor)}
    return Fragment(
        name=name,
        shape=param.shape,
        start=first * row_size,
        stop=(first + local_rows) * row_size,
        weight=_local(param),
        state=tensors,
        step=state.get("step"),
        owner=param,
        replica=replica,
        replicas=replicas,
    )


def _local(tensor: DTensor) -> Tensor:
    return tensor.to_local().detach()
