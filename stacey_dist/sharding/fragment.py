"""The unit of sharding: a contiguous range of one parameter's elements that lives on this rank."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stacey_dist.optim.memory import local

# Parts of parameters' names that wrappers add.
_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(frozen=True, eq=False)
class Fragment:
    """Elements [start, stop) of a parameter, counted row by row, with their state. All tensors are views.

    Attributes:
        name: the parameter's name in the model, without what wrappers add; a tied parameter's first name.
        shape: the shape of the whole parameter.
        start, stop: the range of its flattened elements.
        weight: the elements as the optimizer updates them, in the fp32 master copy where the engine keeps one; in
            any shape with `stop - start` elements (flat ZeRO partitions, rows of a DTensor, a whole parameter).
        state: the optimizer's tensors of these elements by their keys (z and m for Stacey), shaped as `weight`.
            Empty before the first update.
        step: the optimizer's update count, shared by all elements of `owner`; None before the first update.
        owner: the tensor that the optimizer updates, and its key in `optimizer.state`: `weight` is a part of it.
        replica: this rank's number among those that hold the same range; 0 is the copy that counts.
        replicas: how many hold it.
    """

    name: str
    shape: torch.Size
    start: int
    stop: int
    weight: Tensor
    state: Mapping[str, Tensor]
    step: Tensor | None
    owner: Tensor
    replica: int = 0
    replicas: int = 1

    @property
    def z(self) -> Tensor | None:
        """Stacey's dual sequence z; None before the first update or for an optimizer without one."""
        return self.state.get("z")

    @property
    def m(self) -> Tensor | None:
        """Stacey's momentum m; None before the first update or for an optimizer without one."""
        return self.state.get("m")


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the model's trainable parameters under their canonical names, a tied one once."""
    for name, param in model.named_parameters():
        if param.requires_grad:
            yield canonical_name(name), param


def canonical_name(name: str) -> str:
    """Return a parameter's name without what DDP, torch.compile and activation checkpointing add to it.

    A leading "module." is a wrapper's; further down it may be the model's own.
    """
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return ".".join(part for part in parts if part == "module" or part not in _WRAPPERS)


def whole_fragment(name: str, param: Tensor, state: Mapping[str, Any], *, everywhere: bool) -> Fragment:
    """Return the fragment of a parameter that is whole on this rank; on every rank, if `everywhere`."""
    replica, replicas = (dist.get_rank(), dist.get_world_size()) if everywhere and dist.is_initialized() else (0, 1)
    return make_fragment(name, param.shape, 0, param.numel(), param, state, replica=replica, replicas=replicas)


def make_fragment(
    name: str,
    shape: torch.Size,
    start: int,
    stop: int,
    owner: Tensor,
    state: Mapping[str, Any],
    *,
    offset: int | None = None,
    replica: int = 0,
    replicas: int = 1,
) -> Fragment:
    """Return the fragment that lies in a flat `owner` from `offset` on, or is all that this rank has of `owner`."""

    def part(tensor: Tensor) -> Tensor:
        tensor = local(tensor).detach()
        return tensor if offset is None else tensor.narrow(0, offset, stop - start)

    def is_placed_as_owner(value: Any) -> bool:
        # The shape of a DTensor is that of all ranks' parts together. A whole tensor has it, and is no rank's part.
        alike = isinstance(value, DTensor) == isinstance(owner, DTensor)
        return isinstance(value, Tensor) and alike and value.shape == owner.shape

    tensors = {key: part(value) for key, value in state.items() if key != "step" and is_placed_as_owner(value)}
    step = state.get("step")
    if isinstance(step, int | float):
        step = torch.tensor(step, device="cpu")
    return Fragment(name, shape, start, stop, part(owner), tensors, step, owner, replica, replicas)
