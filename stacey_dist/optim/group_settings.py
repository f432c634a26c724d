"""Check the settings of parameter groups, and convert them for the rule."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def require(optimizer: Optimizer, condition: bool, setting: str, value: object, allowed: str) -> None:
    """Raise ValueError naming the setting, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{type(optimizer).__name__}: {setting}={_shown(value)} is not allowed; {allowed}")


def check_common_settings(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Check and canonicalize the settings that every optimizer here has: lr, p, eps, weight_decay."""
    for setting in ("p", "eps", "weight_decay"):  # JSON has no infinity, and YAML reads 1e-8 as text
        group[setting] = as_float(optimizer, setting, group[setting])
    lr = group["lr"]
    if isinstance(lr, Tensor):
        require(optimizer, lr.numel() == 1, "lr", lr, "Tensor lr must be 1-element")
    else:
        group["lr"] = as_float(optimizer, "lr", lr)
    require(optimizer, 0 <= float(group["lr"]) < float("inf"), "lr", lr, "it must be a finite number >= 0")
    require(optimizer, group["p"] >= 2, "p", group["p"], "it must be a number >= 2, or infinity")
    for setting in ("eps", "weight_decay"):
        value = group[setting]
        require(optimizer, 0 <= value < float("inf"), setting, value, "it must be a finite number >= 0")


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
    dtype: torch.dtype = getattr(torch, group["state_dtype"])
    return dtype


def rule_lr(lr: float | Tensor, dtype: torch.dtype) -> float:
    """Return the learning rate as the rule uses it: rounded to float32 for float32 arithmetic.

    So a tensor lr, which holds a float32, gives the same bits as the same lr as a Python number.
    """
    return float(torch.tensor(float(lr), dtype=dtype, device="cpu"))


def _shown(value: object) -> str:
    """Return a value's text for a message, cut where it is long; Python refuses to print integers of 4300 digits."""
    try:
        text = repr(value)
    except ValueError:
        return "<an integer of thousands of digits>"
    return text if len(text) <= 80 else f"{text[:77]}..."
