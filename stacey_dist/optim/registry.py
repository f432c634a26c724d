"""Make DeepSpeed accept these optimizers, by name and by type. This module does not import DeepSpeed."""

import functools
import sys
from typing import Any

import torch
from torch.optim import Optimizer


def register(*classes: type[Optimizer]) -> None:
    """Make a DeepSpeed configuration's `"type"` find the classes: DeepSpeed looks names up in `torch.optim`."""
    for optimizer_class in classes:
        setattr(torch.optim, optimizer_class.__name__, optimizer_class)


def support_in_deepspeed(optimizer_class: type[Optimizer]) -> None:
    """Prepare DeepSpeed for an optimizer of this class that is about to be made, if DeepSpeed is loaded."""
    # ZeRO compares exact types; its configuration would otherwise need `zero_allow_untested_optimizer`.
    zero = sys.modules.get("deepspeed.runtime.zero.utils")
    supported = getattr(zero, "ZERO_SUPPORTED_OPTIMIZERS", None)
    if supported is not None and optimizer_class not in supported:
        supported.append(optimizer_class)
    # Stage 0 in bf16 and fp16 makes an update with zero gradients at the full lr before the first real one, to create
    # the states. It would count a step, decay and couple; ours create their states in their first step.
    unfused = sys.modules.get("deepspeed.runtime.fp16.unfused_optimizer")
    wrapper = getattr(unfused, "FP16_UnfusedOptimizer", None)
    if wrapper is not None and not hasattr(wrapper.initialize_optimizer_states, "skipped_for"):
        wrapper.initialize_optimizer_states = _skipping(wrapper.initialize_optimizer_states)
    if wrapper is not None:
        wrapper.initialize_optimizer_states.skipped_for.add(optimizer_class)


def _skipping(initialize: Any) -> Any:
    """Return DeepSpeed's method, made to do nothing for the optimizer classes in its `skipped_for`."""

    @functools.wraps(initialize)
    def initialize_optimizer_states(self: Any) -> None:
        if type(self.optimizer) not in initialize_optimizer_states.skipped_for:  # type: ignore[attr-defined]
            initialize(self)

    initialize_optimizer_states.skipped_for = set()  # type: ignore[attr-defined]
    return initialize_optimizer_states
