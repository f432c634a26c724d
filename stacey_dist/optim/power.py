"""|x|^q from single IEEE-754 operations, so that an element's result depends on the element alone.

Library `pow`, `exp` and `log` give other bits in a vector's tail than in its body, and other bits on another
device. Everything in float32 here is one correctly rounded addition, subtraction, multiplication, division or
an integer operation at a time, in a fixed order and never contracted to a fused multiply-add: any device, any
thread count and any split of a tensor computes the same bits. float64 is for reference runs and uses torch's
own functions.

A positive number is carried as its base-2 logarithm in two parts, `whole + fraction`, `whole` an integer and
`fraction` in [-0.42, 0.59], because one float32 cannot hold a logarithm near 128 to the precision that a power
needs.
"""

import math

import torch
from torch import Tensor

# log2 of zero: so negative that no other number's power up to 1000 reaches it, yet finite.
ZERO_EXPONENT = -(2.0**20)

# The bits of 3/4: mantissas are taken from [3/4, 3/2), as AVX-512 has an instruction for.
_THREE_QUARTERS_BITS = 0x3F400000
_EXPONENT_MASK = -0x00800000  # 0xff800000: sign and exponent of a float32
_SMALLEST_NORMAL_BITS = 0x00800000

# log2(m) = s (a0 + a1 s^2 + a2 s^4), s = (m - 1) / (m + 1): minimax, relative error 3e-7.
_LOG2 = (2.8853909969329834, 0.9614068269729614, 0.6027452945709229)
# 2^t = 1 + b1 t + ... + b5 t^5 on [-1/2, 1/2]: minimax, relative error 9e-8.
_EXP2 = (
    0.6931470036506653,
    0.24022242426872253,
    0.05550733581185341,
    0.009671512991189957,
    0.001326472731307149,
)


def split(value: float) -> tuple[float, float]:
    """`value` as `high + low`, `high` of 12 significant bits: `high` times an exponent is exact in float32."""
    mantissa, exponent = math.frexp(value)
    high = math.ldexp(round(mantissa * 4096.0), exponent - 12)
    return high, value - high


def log2_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Base-2 logarithm of `x >= 0` (float32 or float64, subnormals too) as (whole, fraction).

    Zero gives `ZERO_EXPONENT`. Infinity and NaN give finite values: callers bring them back by arithmetic with `x`.
    """
    if x.dtype == torch.float64:
        mantissa, exponent = torch.frexp(x)
        low = mantissa < 0.75
        fraction = torch.log2(torch.where(low, mantissa * 2.0, mantissa).clamp_min_(0.5))
        whole = torch.where(x == 0, ZERO_EXPONENT, exponent.to(x.dtype) - low.to(x.dtype))
        return whole, torch.where(x == 0, 0.0, fraction)
    # Subnormal numbers are scaled up by 2^24 (times 1.0 otherwise) to have a full mantissa.
    bits = x.view(torch.int32)
    subnormal = (bits - _SMALLEST_NORMAL_BITS).bitwise_right_shift_(31)  # all ones, or zero
    scale = subnormal.bitwise_and(24 << 23).add_(127 << 23).view(torch.float32)
    normal_bits = scale.mul_(x).view(torch.int32)
    exponent = normal_bits - _THREE_QUARTERS_BITS
    mantissa = (normal_bits - (exponent & _EXPONENT_MASK)).view(torch.float32)
    exponent.bitwise_right_shift_(23).sub_(subnormal.bitwise_and_(24))
    zero = (bits - 1).bitwise_right_shift_(31).bitwise_and_(int(ZERO_EXPONENT))
    whole = exponent.add_(zero).to(torch.float32)
    # log2(m) = s (a0 + s^2 (a1 + s^2 a2))
    s = mantissa - 1.0
    s.div_(mantissa.add_(1.0))
    square = s * s
    fraction = (square * _LOG2[2]).add_(_LOG2[1]).mul_(square).add_(_LOG2[0]).mul_(s)
    return whole, fraction


def exp2_sum(high: Tensor, low: Tensor) -> Tensor:
    """2^(high + low), `high` exact and `low` small beside it; 0 below the range, infinity above it.

    Both arguments are consumed (overwritten).
    """
    if high.dtype == torch.float64:
        # Where a number was zero, low is thousands, too, though small beside high; 0 times infinity is not wanted.
        return torch.exp2(high).mul_(torch.exp2(low.clamp_(-1000.0, 1000.0)))
    # k = round(high + low), t = (high - k) + low in [-1/2, 1/2]
    k = (high + low).clamp_(-250.0, 250.0).round_()
    t = high.sub_(k).add_(low)
    t.clamp_(-1.0, 1.0)  # matters only where k was clamped
    # 2^t = 1 + t (b1 + t (b2 + t (b3 + t (b4 + t b5))))
    result = (t * _EXP2[4]).add_(_EXP2[3]).mul_(t).add_(_EXP2[2]).mul_(t).add_(_EXP2[1]).mul_(t).add_(_EXP2[0])
    result.mul_(t).add_(1.0)
    # 2^k as a product of two powers, the first of which is exact, since k alone may lie outside the exponents.
    k = k.to(torch.int32)
    half = k.bitwise_right_shift(1)
    k.sub_(half)
    result.mul_(half.add_(127).bitwise_left_shift_(23).view(torch.float32))
    return result.mul_(k.add_(127).bitwise_left_shift_(23).view(torch.float32))


def power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent for `x >= 0` and `0 <= exponent <= 1`, element-wise, x float32 or float64.

    Exponents 0, 1/2 and 1 are exact (1, a correctly rounded square root, x itself); otherwise the relative error
    in float32 is at most 2e-6 wherever the result is a normal number. 0^exponent is 0 for exponent > 0. Infinity
    gives infinity or NaN.
    """
    if exponent == 0.0:
        return torch.ones_like(x)
    if exponent == 0.5:
        # torch.sqrt may be a vector library's, off by one in the last place on CPUs. The float64 root is too close
        # to the true one for that to show in float32: the root of a float32 is never that near to a midpoint.
        return torch.sqrt(x.to(torch.float64)).to(x.dtype)
    if exponent == 1.0:
        return x
    if x.dtype == torch.float64:
        return torch.pow(x, exponent)
    # 2^(exponent * (whole + fraction)); x - x is 0, but NaN for infinity and NaN
    whole, fraction = log2_parts(x)
    high, low = split(exponent)
    return exp2_sum(whole * high, (whole * low).add_(fraction * exponent)).add_(x - x)
