"""Stochastic rounding whose random bits are a hash of what is rounded.

Rounded to nearest, a bfloat16 z loses most of its movement: an increment below half a step of the grid is
dropped every time. Rounded up with a probability equal to the fraction that would be dropped, it is right on
average. The random bits come from no generator: they are a hash of the seed, the step count and the bits of an
element's values before rounding. One hash, of the new z and m, rounds both, with 16 bits each. A second hash, of the
new weight and its gradient, rounds the weight.
So there is no state to save, and an element is rounded in the same way in a whole parameter, in a flat ZeRO partition
and in a DTensor shard. The price: in one step, elements with equal new z and m are rounded in the same way.
"""

import torch
from torch import Tensor

# Which tensor is rounded: part of the hash, so that states and weights are rounded independently.
STATES, WEIGHT = 1, 2

# A prime near 2^32 over the golden ratio, as a signed number: multiples of it spread evenly.
_MIX = 0x9E3779B1 - (1 << 32)
_MASK_64 = (1 << 64) - 1


def round_key(seed: int, step: int, which: int) -> int:
    """Return a signed 32-bit key of (seed, step count, `STATES` or `WEIGHT`), by splitmix64's finalizer."""
    x = (key_base(seed, which) + step * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    key = (x ^ (x >> 31)) & 0xFFFFFFFF
    return key - (1 << 32) if key >= 1 << 31 else key


def key_base(seed: int, which: int) -> int:
    """Return the part of `round_key`'s input that needs no step count, as a signed 64-bit number."""
    base = (seed * 0x9E3779B97F4A7C15 + which * 0x94D049BB133111EB) & _MASK_64
    return base - (1 << 64) if base >= 1 << 63 else base


def random_bits(first: Tensor, second: Tensor, key: int) -> Tensor:
    """Return 32 random bits per element, as int32: a hash of its two float32 numbers and a key; 0 if one is NaN.

    A NaN's bits are not the same on all machines, and adding to them may make a number of it.
    """
    # The second is rotated by 16 bits, so that its rarely changing bits meet often changing bits of the first.
    turned = second.view(torch.int32)
    turned = (turned << 16).bitwise_or_(_upper(turned))
    h = turned.bitwise_xor_(first.view(torch.int32)).bitwise_xor_(key).mul_(_MIX)
    return h.bitwise_xor_(_upper(h)).mul_((first == first) & (second == second))


def _upper(bits: Tensor) -> Tensor:
    return bits.bitwise_right_shift(16).bitwise_and_(0xFFFF)


def round_stochastic(value: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Round float32 values to `dtype` (bfloat16 or float16), up or down as 16 random bits say, unbiased.

    bfloat16 drops 16 bits of a float32's mantissa, float16 drops 13; the same number of random bits is added
    and the sum truncated. NaN and infinity stay what they are.

    Args:
        value: what is rounded.
        dtype: torch.bfloat16 or torch.float16.
        random: an int32 from 0 to 0xFFFF for each value; is overwritten.
    """
    if dtype == torch.bfloat16:
        return random.add_(value.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32).to(dtype)
    # float16 stops at 2^-14 with a fixed grid of 2^-24. Moved up by 2^-14, smaller numbers have just that grid.
    small = (value.abs() < 2.0**-14).to(torch.float32).mul_(2.0**-14).copysign_(value)
    rounded = random.bitwise_right_shift_(3).add_((value + small).view(torch.int32)).bitwise_and_(-0x2000)
    return rounded.view(torch.float32).sub_(small).to(dtype)


class Store:
    """Writes new values to their tensors at update number `step`, rounding where a tensor is narrower."""

    def __init__(self, rounding: str, seed: int, step: int) -> None:
        self.stochastic = rounding == "stochastic"
        self.states_key, self.weight_key = (round_key(seed, step, which) for which in (STATES, WEIGHT))

    def states(self, z: Tensor, m: Tensor, z_new: Tensor, m_new: Tensor) -> None:
        """Store the new states."""
        if self.stochastic and z.dtype == torch.bfloat16:
            z_new, m_new = z_new.to(torch.float32), m_new.to(torch.float32)
            random = random_bits(z_new, m_new, self.states_key)
            z_new = round_stochastic(z_new, z.dtype, _upper(random))
            m_new = round_stochastic(m_new, m.dtype, random.bitwise_and_(0xFFFF))
        z.copy_(z_new)
        m.copy_(m_new)

    def weight(self, weight: Tensor, new: Tensor, g: Tensor) -> None:
        """Store new weights of elements whose gradient is `g` (float32 for narrow weights)."""
        if self.stochastic and weight.dtype in (torch.bfloat16, torch.float16):
            new = round_stochastic(new, weight.dtype, _upper(random_bits(new, g, self.weight_key)))
        weight.copy_(new)
