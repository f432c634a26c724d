"""Make DeepSpeed accept these optimizers by type. This module does not import DeepSpeed."""

import functools
import sys
from typing import Any

from torch.optim import Optimizer


def support_in_deepspeed(optimizer_class: type[Optimizer]) -> None:
    """Prepare DeepSpeed for an optimizer of this class that is about to be made, if DeepSpeed is loaded."""
    # ZeRO compares exact types; its configuration would otherwise need `zero_allow_untested_optimizer`.
    zero = sys.modules.get("deepspeed.runtime.zero.utils")
    supported = getattr(zero, "ZERO_SUPPORTED_OPTIMIZERS", None)
    if supported is not None and optimizer_class not in supported:
        supported.append(optimizer_class)
    unfused = sys.modules.get("deepspeed.runtime.fp16.unfused_optimizer")
    wrapper = getattr(unfused, "FP16_UnfusedOptimizer", None)
    if wrapper is not None:
        _without_initial_update(wrapper).add(optimizer_class)


@functools.cache
def _without_initial_update(wrapper: Any) -> set[type[Optimizer]]:
    """Patch DeepSpeed's wrapper for stage 0 in bf16 and fp16, once. Return the set of classes that the patch is for.

    The wrapper creates optimizer state by a step with zero gradients at the full lr. That step would be counted, and
    would apply weight decay and the coupling. The patch skips it; these classes create state in their first step.
    """
    classes: set[type[Optimizer]] = set()
    initialize = wrapper.initialize_optimizer_states

    @functools.wraps(initialize)
    def initialize_optimizer_states(self: Any) -> None:
        if type(self.optimizer) not in classes:
            initialize(self)

    wrapper.initialize_optimizer_states = initialize_optimizer_states
    return classes
