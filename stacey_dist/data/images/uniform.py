"""Random numbers as a function of what they are for, not of a generator's state."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from stacey_dist.data.sampler import mix

# Keeps these numbers apart from those of the sampler, which hashes the same seed and epoch.
_PURPOSE = 0x696D6167657321
_MASK = 0xFFFFFFFFFFFFFFFF


def uniforms(seed: int, epoch: int, sample: int, count: int) -> NDArray[np.float64]:
    """Return ``count`` numbers uniform in [0, 1), a pure function of the arguments; more begin with the same ones.

    Args:
        seed: any integer; its lowest 64 bits count.
        epoch: at least 0.
        sample: at least 0.
        count: how many.
    """
    key: NDArray[np.uint64] = mix(_epoch_key(seed & _MASK, epoch) + np.uint64(sample))
    counter: NDArray[np.uint64] = np.arange(count, dtype=np.uint64)
    bits: NDArray[np.uint64] = mix(key + counter)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@lru_cache(maxsize=64)
def _epoch_key(seed: int, epoch: int) -> NDArray[np.uint64]:
    return mix(mix(mix(np.array([_PURPOSE], np.uint64)) + np.uint64(seed)) + np.uint64(epoch))
