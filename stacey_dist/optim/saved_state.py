"""Load the optimizer state of a state dict: check it, and convert it to what kernels take."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from stacey_dist.optim.group_settings import state_dtype
from stacey_dist.optim.memory import readable


def load(optimizer: Any, load_groups: Callable[[dict[str, Any]], None], state_dict: dict[str, Any]) -> None:
    """Load a state dict into an `ElementwiseOptimizer`; `load_groups` is torch's own `load_state_dict`.

    torch's casts state to its parameter's dtype, which would widen bfloat16 states or round float32 ones. So the states
    are removed from what it gets, and are loaded here.
    """
    final: dict[str, Any] = {}

    def check(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        # Settings that the state dict lacks, as one of an older version, take the constructor's values.
        final.update(given, param_groups=[{**optimizer.defaults, **group} for group in given["param_groups"]])
        for param, _group, number, state in _states(optimizer, final):
            _check_state(number, state, optimizer.state_names, param.shape)
        for group, saved_group in zip(optimizer.param_groups, final["param_groups"], strict=False):
            optimizer._check_group({**saved_group, "params": group["params"]})
        numbers = {number for group in final["param_groups"] for number in group["params"]}
        others = {key: value for key, value in final["state"].items() if key not in numbers}
        return {**final, "state": others}  # what a program keeps besides, torch loads as it is

    def complete(_: Any) -> None:
        for group in optimizer.param_groups:
            optimizer._check_group(group)  # a state dict that went through JSON has lists and strings
        for param, group, _number, saved in _states(optimizer, final):
            if saved:
                state = {
                    name: _like_parameter(saved[name], param, state_dtype(group)) for name in optimizer.state_names
                }
                optimizer.state[param] = {"step": step_count(int(saved["step"]), param, group), **state}

    # The last pre-hook sees the state dict as a user's own hooks have left it; the first post-hook completes the state
    # before they look at it.
    before = optimizer.register_load_state_dict_pre_hook(check)
    after = optimizer.register_load_state_dict_post_hook(complete, prepend=True)
    try:
        load_groups(state_dict)
    finally:
        before.remove()
        after.remove()


def step_count(value: int, param: Tensor, group: dict[str, Any]) -> Tensor:
    """Return a parameter's count of updates, on the device where its group keeps it."""
    return torch.full((), value, dtype=torch.int64, device=param.device if group.get("capturable") else "cpu")


def _states(optimizer: Any, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any], int, dict[str, Any]]]:
    """Yield each parameter, its group, its number in the state dict, and what was saved of it: possibly nothing."""
    for group, saved_group in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        for param, number in zip(group["params"], saved_group["params"], strict=False):
            yield param, group, number, state_dict["state"].get(number, {})


def _check_state(number: int, state: dict[str, Any], names: Collection[str], shape: torch.Size) -> None:
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


def _like_parameter(value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a saved state in a dtype, on the device and with the order in memory of its parameter, for kernels."""
    value = value.to(param.device, dtype)
    if value.stride() != param.stride() or readable(value) is not value:
        value = torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(value)
    return value
