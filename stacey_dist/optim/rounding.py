"""Stochastic rounding whose random bits are a hash of what is rounded.

Rounded to nearest, a bfloat16 z loses most of its movement: an increment below half a step of the grid is
dropped every time. Rounded up with a probability equal to the fraction that would be dropped, it is right on
average. The random bits come from no generator: they are a hash of the seed, the step count, which tensor is
rounded, the value's bits before rounding and the gradient's bits. So there is no state to save, and an element is
rounded alike in a whole parameter, in a flat ZeRO partition and in a DTensor shard.

Elements with the same value and the same gradient are rounded alike within a step; that is the price.
"""

import torch
from torch import Tensor

# Which tensor is rounded: part of the hash, so that z, m and the weight are rounded independently.
Z, M, WEIGHT = 1, 2, 3

# Odd 32-bit multipliers as signed numbers: murmur3's two finalizer constants and the golden ratio.
_MIX_1 = 0x85EBCA6B - (1 << 32)
_MIX_2 = 0xC2B2AE35 - (1 << 32)
_GOLDEN = 0x9E3779B9 - (1 << 32)
_MASK_64 = (1 << 64) - 1


def round_key(seed: int, step: int, tensor: int) -> int:
    """A signed 32-bit key from (seed, step count, which tensor): splitmix64's finalizer over the three."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + tensor * 0x94D049BB133111EB) & _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    key = (x ^ (x >> 31)) & 0xFFFFFFFF
    return key - (1 << 32) if key >= 1 << 31 else key


def gradient_hash(g: Tensor) -> Tensor:
    """An int32 hash of each gradient's float32 bits, shared by all tensors rounded in the same step."""
    h = g.to(torch.float32).view(torch.int32) * _GOLDEN
    return h.bitwise_xor_(h >> 15)


def round_stochastic(value: Tensor, dtype: torch.dtype, hashed_gradient: Tensor, key: int) -> Tensor:
    """`value` (float32 or float64) rounded to `dtype`, up or down at random, unbiased.

    bfloat16 drops 16 bits of a float32's mantissa, float16 drops 13; the same number of random bits is added
    and the sum truncated. Other dtypes need no rounding and are converted. NaN stays NaN, and infinity
    becomes NaN.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return value.to(dtype)
    value = value.to(torch.float32)
    bits = value.view(torch.int32)
    h = (bits ^ hashed_gradient).bitwise_xor_(key).mul_(_MIX_1)
    h = h.bitwise_xor_(h >> 15).mul_(_MIX_2)
    if dtype == torch.bfloat16:
        random = h.bitwise_right_shift_(16).bitwise_and_(0xFFFF)
        rounded = random.add_(bits).bitwise_and_(-0x10000).view(torch.float32)
    else:
        # float16 stops at 2^-14 with a fixed grid of 2^-24. Moved up by 2^-14, smaller numbers have just that grid.
        small = (value.abs() < 2.0**-14).to(torch.float32).mul_(2.0**-14).copysign_(value)
        random = h.bitwise_right_shift_(19).bitwise_and_(0x1FFF)
        rounded = random.add_((value + small).view(torch.int32)).bitwise_and_(-0x2000).view(torch.float32)
        rounded.sub_(small)
    # value - value is 0, but NaN for NaN and infinity: a NaN's bits may have overflowed to a number above.
    return rounded.add_(value - value).to(dtype)


class Store:
    """Writes new values into their tensors at update number `step`, rounding where a tensor is narrower."""

    def __init__(self, rounding: str, seed: int, step: int) -> None:
        self.stochastic = rounding == "stochastic"
        self.keys = {tensor: round_key(seed, step, tensor) for tensor in (Z, M, WEIGHT)}

    def __call__(self, g: Tensor, *updates: tuple[Tensor, Tensor, int]) -> None:
        """Store each (target, new value, which tensor), for elements whose gradient is `g`."""
        hashed: Tensor | None = None
        for target, value, tensor in updates:
            if self.stochastic and target.dtype in (torch.bfloat16, torch.float16):
                hashed = gradient_hash(g) if hashed is None else hashed
                value = round_stochastic(value, target.dtype, hashed, self.keys[tensor])
            target.copy_(value)
