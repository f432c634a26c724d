"""One process, and DistributedDataParallel: every rank has all of every parameter."""

from collections.abc import Iterator

from torch import nn
from torch.optim import Optimizer

from stacey_dist.sharding.fragment import Fragment, trainable_parameters, whole


def list_fragments(model: nn.Module, optimizer: Optimizer) -> Iterator[Fragment]:
    """Yield every parameter as a whole; every rank is a replica."""
    for name, param in trainable_parameters(model):
        yield whole(name, param, optimizer.state.get(param, {}), everywhere=True)


def refresh_weights(model: nn.Module, optimizer: Optimizer) -> None:
    """Do nothing: the optimizer updates the weights that the model computes with."""
