"""Compute the numbers that a kernel takes from the settings, as the plain rule has them."""

import math

from stacey_dist.optim.power import split
from stacey_dist.optim.rule import StaceySettings, log2_in_parts, steepest_exponent

VARIANTS = ("p2", "pp", "2p")
# |x|^0, |x|^(1/2), |x|^1, and |x|^exponent, as in power.power
ONE, ROOT, SAME, GENERAL = range(4)

FLOATS = (
    *("primal_rate", "pull", "alpha", "tau", "beta1", "beta1_rest", "beta2", "beta2_rest", "eps"),
    *("exponent_high", "exponent_low", "exponent"),
    *("inner_high", "inner_low", "inner"),
    *("root_high", "root_low", "root"),
    *("log_alpha_whole", "log_alpha_fraction"),
)


def power_kind(s: StaceySettings) -> int:
    """Return how |c|^((p-2)/(p-1)) is computed: `ONE`, `ROOT`, `SAME` or `GENERAL`."""
    return {0.0: ONE, 0.5: ROOT, 1.0: SAME}.get(steepest_exponent(s.p), GENERAL)


def float_constants(s: StaceySettings) -> dict[str, float]:
    """Return the values of `FLOATS`, which the kernels round to float32, as torch does beside a float32 tensor."""
    exponent = steepest_exponent(s.p)
    inner = s.p - 1.0 if math.isfinite(s.p) else 1.0
    root = 1.0 / inner
    highs_and_lows = [split(value) for value in (exponent, inner, root)]
    values = (
        *(
            (1.0 - s.tau) * s.lr,
            s.tau + s.lr * s.weight_decay,
            s.alpha,
            s.tau,
            s.beta1,
            1.0 - s.beta1,
            s.beta2,
            1.0 - s.beta2,
            s.eps,
        ),
        *(*highs_and_lows[0], exponent, *highs_and_lows[1], inner, *highs_and_lows[2], root),
        *(s.log2_alpha or log2_in_parts(s.alpha)),
    )
    return dict(zip(FLOATS, values, strict=True))
