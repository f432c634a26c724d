"""The numbers that a kernel needs of the settings, worked out once, as the plain rule has them."""

import math

from stacey_dist.optim.power import split
from stacey_dist.optim.rule import StaceySettings, log2_in_parts

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
    """Which road |c|^((p-2)/(p-1)) takes."""
    return {0.0: ONE, 0.5: ROOT, 1.0: SAME}.get(_exponent(s), GENERAL)


def float_constants(s: StaceySettings) -> dict[str, float]:
    """Return the values of `FLOATS`, which the kernels round to float32, as torch does beside a float32 tensor."""
    exponent = _exponent(s)
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


def _exponent(s: StaceySettings) -> float:
    return 1.0 if s.p == math.inf else (s.p - 2.0) / (s.p - 1.0)
