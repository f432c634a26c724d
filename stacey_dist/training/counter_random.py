"""Random numbers that are functions of a key and a position, for initial weights: a counter-based generator.

Everything is an integer operation, or a single correctly rounded addition or multiplication of float64 numbers at a
time, rounded to float32 at the end: every device, and every split of a tensor, computes the same bits. Library
functions (`log`, `cos`, `torch.randn`) give other bits on another device, and in a vector's tail.
"""

import hashlib

import torch
from torch import Tensor

from stacey_dist.optim.power import LOG2_NEAR_ONE, power

# splitmix64 (Steele, Lea and Flood, 2014): the increment, and the multipliers of its finalizer.
_INCREMENT, _FIRST, _SECOND = (x - (1 << 64) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_THREE_QUARTERS_BITS, _EXPONENT_MASK = 0x3FE8000000000000, -(1 << 52)  # of a float64
_MINUS_2_LN_2 = -1.3862943611198906
# sin(pi/2 w) = w (a0 + w^2 (a1 + ...)) for w in [-1, 1], relative error 5.3e-9: a minimax fit.
_SINE = (
    *(1.570796318447244, -0.6459637105931046, 0.07968967892097217),
    *(-0.0046737665730773315, 0.00015148511165558043),
)


def normal(key: str, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """Return float64 numbers from the standard normal distribution for positions [start, stop) of a key.

    By the method of Box and Muller (1958); none is beyond 6.7. Scaled and rounded to float32, they have the same bits
    on every device.
    """
    high, low = _random(key, start, stop, device)
    u = high.mul_(2.0**-32).add_(0.5 + 2.0**-32)  # in (0, 1]
    # -2 ln(u) = -2 ln(2) (whole + fraction), mantissas in [3/4, 3/2)
    bits = u.view(torch.int64)
    exponent = bits - _THREE_QUARTERS_BITS
    r = (bits - exponent.bitwise_and(_EXPONENT_MASK)).view(torch.float64).sub_(1.0)
    whole = exponent.bitwise_right_shift_(52).to(torch.float64)
    squared = _polynomial(r, LOG2_NEAR_ONE).mul_(r).add_(whole).mul_(_MINUS_2_LN_2)
    # A root of float64 numbers need not be rounded correctly; that of a float32 number is, in float32.
    radius = power(squared.to(torch.float32), 0.5)
    # The sine of an angle uniform in [-pi/2, pi/2) is distributed as the cosine of one in [0, 2 pi).
    w = low.mul_(2.0**-31)
    return _polynomial(w * w, _SINE).mul_(w).mul_(radius)


def uniform(key: str, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """Return float64 numbers, multiples of 2^-32 uniform in [0, 1), for positions [start, stop) of a key."""
    high, _ = _random(key, start, stop, device)
    return high.mul_(2.0**-32).add_(0.5)


def _random(key: str, start: int, stop: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return two independent integers from [-2^31, 2^31) for each position, as float64.

    The upper and lower half of splitmix64's output, with a second part of the key amid its finalizer: keys have other
    sequences, and not only other places in one.
    """
    digest = hashlib.sha256(key.encode()).digest()
    first, second = (int.from_bytes(digest[i : i + 8], "little", signed=True) for i in (0, 8))
    x = torch.arange(start, stop, device=device).mul_(_INCREMENT).add_(first)
    x.bitwise_xor_(_shifted(x, 30)).mul_(_FIRST).bitwise_xor_(second)
    x.bitwise_xor_(_shifted(x, 27)).mul_(_SECOND)
    x.bitwise_xor_(_shifted(x, 31))
    low = x.bitwise_left_shift(32).bitwise_right_shift_(32)
    return x.bitwise_right_shift_(32).to(torch.float64), low.to(torch.float64)


def _shifted(x: Tensor, places: int) -> Tensor:
    """Return the bits moved to the right, zeros moved in."""
    return x.bitwise_right_shift(places).bitwise_and_((1 << (64 - places)) - 1)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    *rest, last = coefficients
    result = torch.full_like(x, last)
    for coefficient in reversed(rest):
        result.mul_(x).add_(coefficient)
    return result
