"""Check and convert the optimizer state of a state dict."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from stacey_dist.optim.memory import readable


def check_state(number: int, state: dict[str, Any], names: Collection[str], shape: torch.Size) -> None:
    """Raise ValueError if the state of a parameter is another optimizer's, or does not have the parameter's shape.

    Args:
        number: the parameter's, for the message.
        state: what was saved of the parameter; may be empty.
        names: the states that the optimizer keeps.
        shape: the parameter's.
    """
    expected = ("step", *names)
    if state and set(state) != set(expected):
        what = f"{', '.join(map(str, state))} and not {', '.join(expected)}"
        raise ValueError(f"the state of parameter {number} has {what}: it is another optimizer's")
    for name in names if state else ():
        value, what = state[name], f"state {name} of parameter {number}"
        if not isinstance(value, Tensor):
            raise ValueError(f"{what} is a {type(value).__name__}, not a tensor")
        if value.layout is not torch.strided or value.is_nested or not value.is_floating_point():
            raise ValueError(f"{what} is not a dense tensor of floating point numbers")
        if value.shape != shape:
            raise ValueError(f"{what} has the shape {tuple(value.shape)}, and its parameter {tuple(shape)}")


def like_parameter(value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a saved state in a dtype, on the device and with the order in memory of its parameter, for kernels."""
    value = value.to(param.device, dtype)
    if value.stride() != param.stride() or readable(value) is not value:
        value = torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(value)
    return value
