"""|x|^q from single IEEE-754 operations, so that an element's result depends on the element alone.

Library `pow`, `exp` and `log` give other bits in a vector's tail than in its body, and other bits on another
device. Everything in float32 here is one correctly rounded addition, subtraction, multiplication or fused
multiply-add, or an integer operation, at a time and in a fixed order: any device, any thread count and any split of a
tensor computes the same bits. A multiply-add is fused exactly where `multiply_add` stands, and nowhere else. float64 is
for reference runs and uses torch's own functions.

A positive number is carried as its base-2 logarithm in two parts, `whole + fraction`, `whole` an integer and
`fraction` within [-0.42, 1], because one float32 cannot hold a logarithm near 128 to the precision that a power
needs.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# The base-2 logarithm of zero: so negative that no other number's power up to 1000 reaches it, yet finite.
ZERO_EXPONENT = -(2.0**20)
SMALLEST_NORMAL = 2.0**-126
# Added to a number below 2^22 in size, it rounds the number to an integer, which stands in the sum's lowest bits.
MAGIC = 1.5 * 2.0**23

_THREE_QUARTERS_BITS = 0x3F400000
_ONE_BITS = 0x3F800000
_EXPONENT_MASK = -0x00800000  # 0xff800000: sign and exponent of a float32
_MANTISSA_MASK = 0x007FFFFF

# Minimax polynomials, their coefficients rounded to float32 one after the other and the rest fitted again.
# log2(1 + r) = r (a0 + r (a1 + ...)) for r in [0, 1), absolute error 4.7e-8.
LOG2 = (
    *(1.4426898956298828, -0.7211660742759705, 0.47868552803993225, -0.3473072350025177),
    *(0.24187606573104858, -0.13753284513950348, 0.05206507816910744, -0.009310458786785603),
)
# log2(1 + r) = r (a0 + r (a1 + ...)) for r in [-1/4, 1/2), relative error 1.2e-6.
LOG2_NEAR_ONE = (
    *(1.4426963329315186, -0.72132807970047, 0.48062604665756226, -0.36156418919563293),
    *(0.29827117919921875, -0.24252602458000183, 0.11968280375003815),
)
# 2^t = 1 + t (b0 + t (b1 + ...)) for t in [-1/2, 1/2], relative error 1.5e-7, mean 5e-8.
EXP2 = (
    *(0.6931469440460205, 0.24022284150123596, 0.055508024990558624),
    *(0.00966894906014204, 0.0013235454680398107),
)


def multiply_add(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """Return a * b + c, in float32 rounded once, as a processor's fused multiply-add is.

    Numbers are rounded to the dtype of `a` first. In float64 the product is rounded, too.
    """
    if a.dtype == torch.float64:
        return (a * b).add_(c)
    # In float64 the product is exact. Rounding the sum twice, to float64 and then to float32, is as good as once unless
    # the float64 is a tie, midway between two float32 numbers.
    product = a.to(torch.float64).mul_(_rounded(b))
    c = _rounded(c)
    total = product + c
    # Looking at values would wait for a GPU, and a compiler has none: there every sum is treated as a tie.
    if total.device.type == "cpu" and not torch.compiler.is_compiling() and not _may_have_ties(total):
        return total.to(torch.float32)
    # The sum is rounded to odd: its last bit is 1 where it is not exact, which keeps the final rounding to float32 from
    # taking for a tie what is none (Boldo and Melquiond, 2008).
    back = total - product
    error = product.sub_(total - back).add_(c - back)  # exact (Knuth's TwoSum); NaN where the sum is not finite
    bits = total.view(torch.int64)
    beyond = (error * total).lt_(0.0)
    bits.sub_(beyond.to(torch.int8)).bitwise_or_((error.abs_() > 0.0).view(torch.int8))
    return total.to(torch.float32)


def _may_have_ties(x: Tensor) -> bool:
    """Return False only if no float64 in `x` lies midway between two float32 numbers."""
    bits = x.view(torch.int64)
    # Of a tie's last 29 bits, which float32 lacks, the first alone is 1; a subnormal float32 lacks more bits.
    if bits.bitwise_and(0x0FFFFFFF).all():
        return False
    tie = bits.bitwise_and(0x1FFFFFFF).eq_(0x10000000)  # and not 0, as a float32's own are
    return bool(tie.any()) or bool(((x.abs() < SMALLEST_NORMAL) & (x != 0.0)).any())


def _rounded(x: Tensor | float) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float32, device="cpu")


def polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Evaluate the polynomial with the given coefficients, from the constant one on, by Horner's rule."""
    *rest, before, last = coefficients
    result = multiply_add(x, last, before)
    for coefficient in reversed(rest):
        result = multiply_add(result, x, coefficient)
    return result


def split(value: float) -> tuple[float, float]:
    """Split `value` into `high + low`, `high` of 12 significant bits: `high` times an exponent is exact in float32."""
    mantissa, exponent = math.frexp(value)
    high = math.ldexp(round(mantissa * 4096.0), exponent - 12)
    return high, value - high


def log2_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the base-2 logarithm of `x > 0` (float32 or float64, subnormal numbers too) as (whole, fraction).

    Zero, infinity and NaN give finite numbers: callers look at `x`.
    """
    if x.dtype == torch.float64:
        return _log2_parts_float64(x)
    # Subnormal numbers are scaled up by 2^24 to have a full mantissa.
    small = x < SMALLEST_NORMAL
    bits = torch.where(small, x * 2.0**24, x).view(torch.int32)
    whole = bits.bitwise_right_shift(23).sub_(torch.where(small, 127 + 24, 127)).to(torch.float32)
    r = bits.bitwise_and_(_MANTISSA_MASK).bitwise_or_(_ONE_BITS).view(torch.float32) - 1.0
    return whole, polynomial(r, LOG2).mul_(r)


def log2_near_one(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the base-2 logarithm of a normal `x` as (whole, fraction), exact to a relative error also near `x = 1`.

    Zero gives `ZERO_EXPONENT`.
    """
    if x.dtype == torch.float64:
        return _log2_parts_float64(x)
    bits = x.view(torch.int32)
    exponent = bits - _THREE_QUARTERS_BITS
    r = (bits - (exponent & _EXPONENT_MASK)).view(torch.float32) - 1.0  # mantissas are in [3/4, 3/2)
    whole = exponent.bitwise_right_shift_(23).to(torch.float32)
    return torch.where(x == 0.0, ZERO_EXPONENT, whole), polynomial(r, LOG2_NEAR_ONE).mul_(r)


def _log2_parts_float64(x: Tensor) -> tuple[Tensor, Tensor]:
    mantissa, exponent = torch.frexp(x)
    low = mantissa < 0.75
    fraction = torch.log2(torch.where(low, mantissa * 2.0, mantissa).clamp_min_(0.5))
    whole = torch.where(x == 0.0, ZERO_EXPONENT, exponent.to(x.dtype) - low.to(x.dtype))
    return whole, torch.where(x == 0.0, 0.0, fraction)


def nearest_integer(x: Tensor, factor: float = 1.0) -> Tensor:
    """Return an integer within 1/2, and a rounding error, of `factor * x`, where that is below 2^22 in size."""
    if x.dtype == torch.float64:
        return (x * factor).round_()
    return multiply_add(x, factor, MAGIC).sub_(MAGIC)


def exp2_parts(k: Tensor, t: Tensor) -> Tensor:
    """Return 2^(k + t), rounded once where it is subnormal: `k` an integer, at most 250, and `t` in [-1/2, 1/2]."""
    if k.dtype == torch.float64:
        return torch.exp2(t).mul_(torch.exp2(k))
    first, second = _two_powers(k)  # the product with the first is exact
    return multiply_add(polynomial(t, EXP2), t, 1.0).mul_(first).mul_(second)


def exp2_times(x: Tensor, k: Tensor, t: Tensor) -> Tensor:
    """Return x 2^(k + t), which is nearer to the true value the nearer the power is to one. See `exp2_parts`."""
    if k.dtype == torch.float64:
        return exp2_parts(k, t).mul_(x)
    first, second = _two_powers(k)
    scaled = first.mul_(second).mul_(x)
    return multiply_add(scaled, polynomial(t, EXP2).mul_(t), scaled)


def _two_powers(k: Tensor) -> tuple[Tensor, Tensor]:
    """Return two powers of two whose product is 2^k, since k alone may lie outside the exponents of float32."""
    whole = k.clamp_min(-250.0).to(torch.int32)
    half = whole.bitwise_right_shift(1)
    return _power_of_two(half), _power_of_two(whole.sub_(half))


def _power_of_two(k: Tensor) -> Tensor:
    return (k + 127).bitwise_left_shift_(23).view(torch.float32)


def product_parts(whole: Tensor, fraction: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return factor (whole + fraction) as (k, t), an integer and the remainder, within [-1/2, 1/2]."""
    k = nearest_integer(whole + fraction, factor)
    return k, product_less(whole, fraction, factor, k)


def product_less(whole: Tensor, fraction: Tensor, factor: float, k: Tensor) -> Tensor:
    """Return factor (whole + fraction) - k, a small difference of large terms, with about one rounding error."""
    high, low = split(factor)
    t = multiply_add(whole, high, -k)
    return multiply_add(fraction, factor, multiply_add(whole, low, t))


def power(x: Tensor, exponent: float) -> Tensor:
    """Return x^exponent for `x >= 0` and `0 <= exponent <= 1`, element-wise, x float32 or float64.

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
    # 2^(exponent log2(x)); x - x is 0, but NaN for infinity and NaN
    result = exp2_parts(*product_parts(*log2_parts(x), exponent)).add_(x - x)
    return torch.where(x == 0.0, 0.0, result)
