"""Compute the numbers that a kernel takes from the settings, as the plain rule has them."""

import math
from typing import get_args

from stacey_dist.optim.power import split
from stacey_dist.optim.rule import StaceySettings, Variant, log2_in_parts, steepest_exponent

VARIANTS: tuple[str, ...] = get_args(Variant)
# |x|^0, |x|^(1/2), |x|^1, and |x|^exponent, as in power.power
ONE, ROOT, SAME, GENERAL = range(4)


def power_kind(s: StaceySettings) -> int:
    """Return how |c|^((p-2)/(p-1)) is computed: `ONE`, `ROOT`, `SAME` or `GENERAL`."""
    return {0.0: ONE, 0.5: ROOT, 1.0: SAME}.get(steepest_exponent(s.p), GENERAL)


def float_constants(s: StaceySettings) -> dict[str, float]:
    """Return the kernels' float32 constants, in the order of `Settings` in cpu.cpp.

    The kernels round them to float32, as torch rounds a Python number beside a float32 tensor. With the lr on the
    device, `triton.stacey_step` computes `primal_rate`, `pull` and what follows the lr by itself: change both.
    """
    numbers = dict(
        primal_rate=(1.0 - s.tau) * s.lr,
        pull=s.tau + s.lr * s.weight_decay,
        alpha=s.alpha,
        tau=s.tau,
        beta1=s.beta1,
        beta1_rest=1.0 - s.beta1,
        beta2=s.beta2,
        beta2_rest=1.0 - s.beta2,
        eps=s.eps,
    )
    inner = s.p - 1.0 if math.isfinite(s.p) else 1.0
    for name, factor in (("exponent", steepest_exponent(s.p)), ("inner", inner), ("root", 1.0 / inner)):
        numbers[f"{name}_high"], numbers[f"{name}_low"] = split(factor)
        numbers[name] = factor
    numbers["log_alpha_whole"], numbers["log_alpha_fraction"] = s.log2_alpha or log2_in_parts(s.alpha)
    return numbers
