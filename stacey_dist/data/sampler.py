"""A global shuffle and random numbers as functions of their places, without state or a stored permutation."""

import functools

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stacey_dist.errors import InputError

# Halves of one bit mix slowly: with 8 rounds, pairs of samples out of 5 to 8 were visibly uneven.
_ROUNDS = 16
_LARGEST = 2**40
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = 0xFFFFFFFFFFFFFFFF
# Keeps the numbers of `uniforms` apart from those of the sampler, which hashes the same seed and epoch.
_PURPOSE = 0x696D6167657321


class GlobalSampler:
    """An endless order of samples, every epoch another permutation of them all.

    The sample at global position k is a pure function of (seed, k): epoch ``k // size`` has its own
    permutation, taken at ``k % size``. A resumed run, on any number of ranks, needs k alone.

    The permutation is a keyed Feistel network on the smallest power of two that holds ``size``, walked along
    its cycles until it falls below ``size``: exact for every size, and no two positions of an epoch can meet.

    Args:
        size: number of samples, from 1 to 2**40.
        seed: any integer; its lowest 64 bits count.

    Raises:
        InputError: size is out of range.
    """

    def __init__(self, size: int, seed: int) -> None:
        if not 1 <= size <= _LARGEST:
            raise InputError(f"size: {size} is not allowed; a sampler has from 1 to 2**40 samples")
        self.size = size
        self.seed = seed
        bits = (size - 1).bit_length()
        # Unequal halves for an odd number of bits, so that the domain is below twice the size.
        self._low_bits = np.uint64((bits + 1) // 2)
        self._low_mask = np.uint64((1 << ((bits + 1) // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits // 2)) - 1)

    def sample(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Return the samples at global positions, int64 of their shape.

        Raises:
            ValueError: a position is negative.
        """
        positions = np.asarray(positions)
        if positions.size and positions.min() < 0:
            raise ValueError(f"a sampler's positions start at 0, got {positions.min()}")
        # One dimension at least: numpy warns of wraparound in scalars, and here it is wanted.
        flat = positions.astype(np.uint64).reshape(-1)
        size = np.uint64(self.size)
        keys = self._keys(flat // size)
        samples = self._permute(flat % size, keys)
        while (outside := np.flatnonzero(samples >= size)).size:
            samples[outside] = self._permute(samples[outside], keys[outside])
        return samples.astype(np.int64).reshape(positions.shape)

    def samples(self, position: int, count: int) -> NDArray[np.int64]:
        """Return the samples at the positions [position, position + count), int64 of length count."""
        return self.sample(np.arange(position, position + count, dtype=np.int64))

    @functools.lru_cache(maxsize=16)  # noqa: B019  # asked again for each update of an epoch
    def position(self, sample: int, epoch: int) -> int:
        """Return the global position of a sample in an epoch: `sample` of it is that sample.

        Raises:
            ValueError: there is no such sample, or the epoch is negative.
        """
        if not 0 <= sample < self.size or epoch < 0:
            raise ValueError(f"sample {sample} of {self.size} in epoch {epoch}")
        keys = self._keys(np.array([epoch], dtype=np.uint64))
        value = self._permute_back(np.array([sample], dtype=np.uint64), keys)
        while value[0] >= self.size:
            value = self._permute_back(value, keys)
        return epoch * self.size + int(value[0])

    def _keys(self, epochs: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return _mix(epochs + _mix(np.array([self.seed & _MASK], dtype=np.uint64)))

    def _permute(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Apply each value's keyed permutation of the power of two, once."""
        high, low = values >> self._low_bits, values & self._low_mask
        for number in range(0, _ROUNDS, 2):
            # Each half in turn is changed by a function of the other: undone by the same steps backwards.
            high = (high ^ _mix(_mix(keys + np.uint64(number)) + low)) & self._high_mask
            low = (low ^ _mix(_mix(keys + np.uint64(number + 1)) + high)) & self._low_mask
        return (high << self._low_bits) | low

    def _permute_back(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Undo `_permute`."""
        high, low = values >> self._low_bits, values & self._low_mask
        for number in range(_ROUNDS - 2, -1, -2):
            low = (low ^ _mix(_mix(keys + np.uint64(number + 1)) + high)) & self._low_mask
            high = (high ^ _mix(_mix(keys + np.uint64(number)) + low)) & self._high_mask
        return (high << self._low_bits) | low


def uniforms(seed: int, epoch: int, sample: int, count: int) -> NDArray[np.float64]:
    """Return ``count`` numbers uniform in [0, 1), a pure function of the arguments; more begin with the same ones.

    Args:
        seed: any integer; its lowest 64 bits count.
        epoch: at least 0.
        sample: at least 0.
        count: how many.
    """
    key: NDArray[np.uint64] = _mix(_epoch_key(seed & _MASK, epoch) + np.uint64(sample))
    counter: NDArray[np.uint64] = np.arange(count, dtype=np.uint64)
    bits: NDArray[np.uint64] = _mix(key + counter)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@functools.lru_cache(maxsize=64)
def _epoch_key(seed: int, epoch: int) -> NDArray[np.uint64]:
    return _mix(_mix(_mix(np.array([_PURPOSE], np.uint64)) + np.uint64(seed)) + np.uint64(epoch))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit integers, an array of at least one dimension: other integers that look random, one to one.

    A golden-ratio step, so that 0 is not fixed, and murmur3's finalizer.
    """
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
