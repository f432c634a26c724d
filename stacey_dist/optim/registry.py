"""Where programs look for an optimizer by its name: `torch.optim`, and DeepSpeed's list of those that ZeRO supports."""

import sys

import torch
from torch.optim import Optimizer


def register(*classes: type[Optimizer]) -> None:
    """Make a DeepSpeed configuration's `"type"` find the classes: DeepSpeed looks names up in `torch.optim`."""
    for optimizer_class in classes:
        setattr(torch.optim, optimizer_class.__name__, optimizer_class)


def support_in_zero(optimizer_class: type[Optimizer]) -> None:
    """Put a class on ZeRO's list of supported optimizers, if DeepSpeed is loaded.

    DeepSpeed compares exact types, and its configuration would otherwise need `zero_allow_untested_optimizer`.
    """
    zero = sys.modules.get("deepspeed.runtime.zero.utils")
    supported = getattr(zero, "ZERO_SUPPORTED_OPTIMIZERS", None)
    if supported is not None and optimizer_class not in supported:
        supported.append(optimizer_class)
