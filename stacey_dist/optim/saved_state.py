"""Load the optimizer state of a state dict: check it, and convert it to what kernels take."""

from collections.abc import Callable, Collection
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
    loaded: dict[Tensor, dict[str, Any]] = {}

    def check(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        # Settings that the state dict lacks, as one of an older version, take the constructor's values.
        groups = [{**optimizer.defaults, **group} for group in given["param_groups"]]
        # All of it is checked and built before torch replaces anything.
        for own_group, group in zip(optimizer.param_groups, groups, strict=False):
            params = own_group["params"]
            if isinstance(group["lr"], Tensor) and group.get("capturable") and params:
                group["lr"] = group["lr"].to(params[0].device)  # `torch.load` with `map_location` has moved it
            optimizer._check_group({**group, "params": params})
            for param, number in zip(params, group["params"], strict=False):
                if saved := given["state"].get(number):
                    loaded[param] = _state_of(optimizer.state_names, param, group, number, saved)
        numbers = {number for group in groups for number in group["params"]}
        others = {key: value for key, value in given["state"].items() if key not in numbers}
        return {**given, "param_groups": groups, "state": others}  # torch loads what a program keeps besides as it is

    def complete(_: Any) -> None:
        for group in optimizer.param_groups:
            optimizer._check_group(group)  # a state dict that went through JSON has lists and strings
        optimizer.state.update(loaded)

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


def _state_of(
    names: Collection[str], param: Tensor, group: dict[str, Any], number: int, saved: dict[str, Any]
) -> dict[str, Any]:
    """Return the state of a parameter from what was saved of it; `number` is the parameter's, for messages.

    If the optimizer has states, `names`, further entries of a program are kept. Raises ValueError if the state is
    another optimizer's, or does not have the parameter's shape.
    """
    expected = {"step", *names}
    if not expected <= saved.keys() or (not names and saved.keys() != expected):
        what = f"{', '.join(map(str, saved))} and not {', '.join(('step', *names))}"
        raise ValueError(f"the state of parameter {number} has {what}: it is another optimizer's")
    try:
        step = step_count(int(saved["step"]), param, group)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"the step of parameter {number} is not a number of updates: {saved['step']!r}") from error
    for name in names:
        value, what = saved[name], f"state {name} of parameter {number}"
        if not isinstance(value, Tensor):
            raise ValueError(f"{what} is a {type(value).__name__}, not a tensor")
        if value.layout is not torch.strided or value.is_nested or not value.is_floating_point():
            raise ValueError(f"{what} is not a dense tensor of floating point numbers")
        if value.shape != param.shape:
            raise ValueError(f"{what} has the shape {tuple(value.shape)}, and its parameter {tuple(param.shape)}")
        if hasattr(value, "placements") != hasattr(param, "placements"):
            whole, option = ("whole", ", full_state_dict=True") if hasattr(param, "placements") else ("sharded", "")
            raise ValueError(
                f"{what} is {whole} and its parameter is {'sharded' if option else 'whole'}; load it by "
                f"torch.distributed.checkpoint.state_dict.set_optimizer_state_dict{option}"
            )
    return {**saved, "step": step, **{name: like_parameter(saved[name], param, state_dtype(group)) for name in names}}


def like_parameter(value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a state in a dtype, on the device and with the order in memory of its parameter, for kernels."""
    value = value.to(param.device, dtype)
    if value.stride() != param.stride() or readable(value) is not value:
        value = torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(value)
    return value
