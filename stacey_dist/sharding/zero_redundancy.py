"""torch's ZeroRedundancyOptimizer beside DDP: each parameter's state lives on the one rank that updates it."""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn

from stacey_dist.sharding.fragment import Fragment, trainable_parameters, whole


def list_fragments(model: nn.Module, optimizer: Any) -> Iterator[Fragment]:
    """Yield the parameters that this rank updates, as wholes. Its copies of the others have no state.

    Raises NotImplementedError for an optimizer of some of the ranks.
    """
    if (ranks := dist.get_world_size(optimizer.process_group)) != dist.get_world_size():
        raise NotImplementedError(
            f"a ZeroRedundancyOptimizer over {ranks} of the {dist.get_world_size()} ranks is not supported; give it a "
            "process_group of all ranks"
        )
    rank = dist.get_rank(optimizer.process_group)
    owner = optimizer._param_to_rank
    for name, param in trainable_parameters(model):
        if param not in owner:  # trainable, but not given to the optimizer
            yield whole(name, param, {}, everywhere=True)
        elif owner[param] == rank:
            yield whole(name, param, optimizer.optim.state.get(param, {}), everywhere=False)


def refresh_weights(model: nn.Module, optimizer: Any) -> None:
    """Send each parameter from the rank that owns it to the others."""
    optimizer._sync_params()
