"""torch's own engines: DistributedDataParallel, ZeroRedundancyOptimizer, FSDP2 (`fully_shard`) and HSDP.

A parameter is whole on every rank, or on the one rank that updates it, or a DTensor of which each rank has some rows.
"""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard

from stacey_dist.sharding.fragment import Fragment, make_fragment, trainable_parameters, whole_fragment


def list_fragments(model: nn.Module, optimizer: Any) -> Iterator[Fragment]:
    """Yield what this rank has of each parameter: possibly no rows. Ranks with the same elements are replicas.

    With ZeroRedundancyOptimizer, only the rank that updates a parameter yields it. Parameters that FSDP2 has gathered,
    as the root's are after an evaluation, are resharded first.

    Raises NotImplementedError for a parameter that is split other than by rows over one mesh dimension, and for an
    optimizer of some of the ranks.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    owners: dict[Tensor, int] = {}
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        owners, optimizer = _owners(optimizer), optimizer.optim
    for name, param in trainable_parameters(model):
        state = optimizer.state.get(param, {})
        if isinstance(param, DTensor):
            yield _rows(name, param, state)
        elif param not in owners:
            yield whole_fragment(name, param, state, everywhere=True)
        elif owners[param] == dist.get_rank():
            yield whole_fragment(name, param, state, everywhere=False)


def shards(model: nn.Module) -> bool:
    """Return whether `fully_shard` was applied to some of the model, or its parameters are DTensors otherwise."""
    return any(isinstance(m, FSDPModule) for m in model.modules()) or any(
        isinstance(p, DTensor) for p in model.parameters()
    )


def refresh_weights(optimizer: Any) -> None:
    """Have a ZeroRedundancyOptimizer send each parameter from its owner; other optimizers update the model's own."""
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer._sync_params()  # type: ignore[attr-defined]


def _owners(optimizer: Any) -> dict[Tensor, int]:
    """Return the rank that updates each parameter of a ZeroRedundancyOptimizer of all ranks."""
    if (ranks := dist.get_world_size(optimizer.process_group)) != dist.get_world_size():
        raise NotImplementedError(
            f"a ZeroRedundancyOptimizer over {ranks} of the {dist.get_world_size()} ranks is not supported; give it a "
            "process_group of all ranks"
        )
    owners: dict[Tensor, int] = optimizer._param_to_rank
    return owners


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
    start, stop = (rows * param.shape[1:].numel() for rows in (first, last))
    return make_fragment(name, param.shape, start, stop, param, state, replica=replica, replicas=replicas)
