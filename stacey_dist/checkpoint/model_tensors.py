"""The tensors of a model by name, and those outside the fragments: frozen parameters and persistent buffers.

These are whole on every rank, or are gathered one at a time.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from stacey_dist.errors import SettingsError
from stacey_dist.sharding.fragment import canonical_name

# The shape and the dtype's name of a whole tensor; of several, by their names.
Kind = tuple[tuple[int, ...], str]
Contents = Mapping[str, Kind]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def describe(shape: torch.Size, dtype: torch.dtype) -> Kind:
    """Return the entry of a tensor in `Contents`."""
    return tuple(shape), str(dtype).removeprefix("torch.")


def bits(tensor: Tensor) -> Tensor:
    """Return the bits of the elements as integers, flattened: NaN equals itself, and -0 is not 0."""
    return tensor.detach().reshape(-1).view(_INTEGERS.get(tensor.element_size(), torch.uint8))


def check_names(model: nn.Module) -> None:
    """Raise SettingsError if two tensors of a model have the same name without what wrappers add to it."""
    for names in (model.named_parameters(), model.named_buffers()):
        seen: dict[str, str] = {}
        for full_name, _ in names:
            name = canonical_name(full_name)
            if name in seen:
                raise SettingsError(f"{seen[name]} and {full_name} of the model would both be saved as {name}")
            seen[name] = full_name


def full_shape(param: Any) -> torch.Size:
    """Return the shape of a whole parameter; under ZeRO-3 the model's own parameters are empty."""
    shape: torch.Size = getattr(param, "ds_shape", param.shape)
    return shape


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every whole parameter and persistent buffer, by name."""
    found = {canonical_name(name): tuple(full_shape(param)) for name, param in model.named_parameters()}
    return found | {name: tuple(buffer.shape) for name, buffer in persistent_buffers(model)}


def frozen_parameters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the parameters that are not trained, as the engine has them."""
    return ((canonical_name(name), p) for name, p in model.named_parameters() if not p.requires_grad)


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that belong to the model's state dict."""
    persistent = {canonical_name(name) for name in model.state_dict()}
    named = ((canonical_name(name), buffer) for name, buffer in model.named_buffers())
    return ((name, buffer) for name, buffer in named if name in persistent)


def gathered(param: Any, *, write: bool = False) -> AbstractContextManager[Any]:
    """Gather a parameter that ZeRO-3 has partitioned while the context lasts; keep what rank 0 writes if `write`."""
    if not hasattr(param, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([param], modifier_rank=0 if write else None)


@torch.no_grad()
def write_whole(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the frozen parameters and buffers of these names. All ranks call it together."""
    for name, param in frozen_parameters(model):
        if name in values:
            whole = values[name]
            if isinstance(param, DTensor):
                whole = distribute_tensor(whole.to(param.device), param.device_mesh, param.placements)
            with gathered(param, write=True):
                param.copy_(whole)
    for name, buffer in persistent_buffers(model):
        if name in values:
            buffer.copy_(values[name])
