"""Check the settings of parameter groups, and convert them for the rule."""

import ctypes
import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def require(optimizer: Optimizer, condition: bool, setting: str, value: object, allowed: str) -> None:
    """Raise ValueError naming the setting, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{type(optimizer).__name__}: {setting}={_shown(value)} is not allowed; {allowed}")


def check_common_settings(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Check and canonicalize the settings of every optimizer here: lr, p, eps, weight_decay, rounding, seed."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        require(optimizer, lr.numel() == 1, "lr", lr, "Tensor lr must be 1-element")
    else:
        group["lr"] = as_float(optimizer, "lr", lr)
    require(optimizer, 0 <= float(group["lr"]) < math.inf, "lr", lr, "it must be a finite number >= 0")
    group["p"] = as_float(optimizer, "p", group["p"])
    require(optimizer, group["p"] >= 2, "p", group["p"], "it must be a number >= 2, or infinity")
    for setting in ("eps", "weight_decay"):
        check_finite(optimizer, group, setting)
    check_choice(optimizer, group, "rounding", ("stochastic", "nearest"))
    seed = group["seed"]
    is_integer = hasattr(seed, "__index__") and not isinstance(seed, (bool, Tensor))
    require(optimizer, is_integer and seed >= 0, "seed", seed, "it must be an integer >= 0")
    group["seed"] = operator.index(seed)


def check_finite(optimizer: Optimizer, group: dict[str, Any], setting: str) -> None:
    """Make a setting a float. Raise ValueError unless it is finite and at least 0."""
    value = group[setting] = as_float(optimizer, setting, group[setting])
    require(optimizer, 0 <= value < math.inf, setting, value, "it must be a finite number >= 0")


def check_choice(optimizer: Optimizer, group: dict[str, Any], setting: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless a setting is one of several texts."""
    names = ", ".join(f'"{name}"' for name in allowed)
    value = group[setting]
    require(optimizer, isinstance(value, str) and value in allowed, setting, value, f"it must be one of {names}")


def check_betas(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Make betas two floats. Raise ValueError unless each is within [0, 1)."""
    betas = group["betas"]
    try:
        if isinstance(betas, (str, bytes, set, frozenset, dict)):
            raise TypeError
        first, second = betas
    except (TypeError, ValueError):
        require(optimizer, False, "betas", betas, "it must be two numbers")
        raise
    group["betas"] = as_float(optimizer, "betas", first), as_float(optimizer, "betas", second)
    require(optimizer, all(0 <= beta < 1 for beta in group["betas"]), "betas", betas, "each must be within [0, 1)")


def check_state_dtype(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Make the dtype of states its name, since torch's tools for state dicts, and JSON, take numbers and text."""
    name = str(group["state_dtype"]).removeprefix("torch.")
    allowed = ("bfloat16", "float32", "float64")
    require(optimizer, name in allowed, "state_dtype", group["state_dtype"], f"it must be one of {', '.join(allowed)}")
    group["state_dtype"] = name


def as_float(optimizer: Optimizer, setting: str, value: object) -> float:
    """Return `value` as a float; text ("1e-8", "inf") is a number if it reads as one.

    An integer that is too large for a float is infinity. ValueError for what is no number.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]
    except (TypeError, ValueError):
        require(optimizer, False, setting, value, "it must be a number")
        raise


def state_dtype(group: dict[str, Any]) -> torch.dtype:
    """Return the dtype of a group's z and m, which the group has by name."""
    dtype: torch.dtype = getattr(torch, str(group["state_dtype"]).removeprefix("torch."))
    return dtype


def rule_lr(lr: float | Tensor, dtype: torch.dtype) -> float:
    """Return the learning rate as the rule uses it: rounded to float32 for float32 arithmetic.

    So a tensor lr, which holds a float32, gives the same bits as the same lr as a Python number.
    """
    return float(lr) if dtype == torch.float64 else ctypes.c_float(float(lr)).value


def _shown(value: object) -> str:
    """Return a value's text for a message, cut where it is long; Python refuses to print integers of 4300 digits."""
    try:
        text = repr(value)
    except ValueError:
        return "<an integer of thousands of digits>"
    return text if len(text) <= 80 else f"{text[:77]}..."
