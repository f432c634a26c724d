"""The order of a mixture: the source of each position, and the sample within that source."""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stacey_dist.data.sampler import GlobalSampler
from stacey_dist.errors import InputError

LARGEST_PERIOD = 2**20
"""Weights that need a larger common denominator are rounded to this one."""


def shares_of(weights: Sequence[float]) -> list[int]:
    """Return weights as whole numbers without a common divisor, in the same ratio.

    A weight counts as it is written in decimals: 0.1 is one tenth. Where the numbers would sum to more than
    `LARGEST_PERIOD`, each is rounded to a neighbouring multiple of that part of the whole, and may be 0.

    Args:
        weights: finite and greater than 0.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    parts = [weight / sum(exact) for weight in exact]
    period = min(math.lcm(*(part.denominator for part in parts)), LARGEST_PERIOD)
    shares = [int(part * period) for part in parts]
    # What rounding down has left goes to those that lost most.
    lost = sorted(range(len(parts)), key=lambda i: (shares[i] - parts[i] * period, i))
    for i in lost[: period - sum(shares)]:
        shares[i] += 1
    return shares


class MixedSampler:
    """An endless order over several sources, in which each has its share and its own epochs.

    Of the first n positions, a source with the share a of D has more than ``a / D * n - 1`` and fewer than
    ``a / D * n + 1``, whatever n is. The order of the sources repeats after D positions, which hold a samples of
    each: it is laid out once, for D positions, and which sample of its source stands at a position follows from the
    position alone. Within a source, the samples come in the order of a `GlobalSampler`.

    The layout is a schedule of unit tasks (Baruah et al. 1996, Proportionate Progress): sample j of a source is due
    at the positions from floor(j D / a) to ceil((j + 1) D / a) - 1, and of the samples that are due, the one whose
    positions end first is taken. With one processor, all of them are in time (Tijdeman 1980 has the proof that they
    can be).

    Args:
        sizes: number of samples of each source, from 1 to 2**40.
        shares: a whole number of each source; D is their sum, at most `LARGEST_PERIOD`.
        seed: any integer. Source i is shuffled with ``seed + i``.

    Raises:
        InputError: a size or a share is out of range.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[int], seed: int) -> None:
        if not (len(sizes) == len(shares) > 0 and min(shares) > 0 and sum(shares) <= LARGEST_PERIOD):
            raise InputError(
                f"shares: {list(shares)} is not allowed; each of {len(sizes)} sources has one, they are > 0 and sum "
                f"to {LARGEST_PERIOD:,} at most"
            )
        self.samplers = [GlobalSampler(size, seed + i) for i, size in enumerate(sizes)]
        self._shares = np.array(shares, dtype=np.int64)
        self._source = _layout(shares)
        order = np.argsort(self._source, kind="stable")
        self._places = np.split(order, np.cumsum(shares)[:-1])

    def samples(self, position: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the sources and their samples at the positions [position, position + count), of length count each."""
        positions = np.arange(position, position + count, dtype=np.int64)
        sources = self._source[positions % len(self._source)]
        samples = np.empty_like(positions)
        for i, sampler in enumerate(self.samplers):
            samples[sources == i] = sampler.sample(self._before(i, positions[sources == i]))
        return sources, samples

    def counts(self, position: int) -> list[int]:
        """Return how many samples of each source stand before a position."""
        return [int(self._before(source, position)) for source in range(len(self.samplers))]

    def _before(self, source: int, positions: ArrayLike) -> NDArray[np.int64]:
        """Return how many samples of a source stand before each position."""
        rounds, places = np.divmod(positions, len(self._source))
        return rounds * self._shares[source] + np.searchsorted(self._places[source], places)

    def times(self, source: int, sample: int, position: int, count: int) -> int:
        """Return how often a sample of a source stands at the positions [position, position + count)."""
        sampler = self.samplers[source]
        first, stop = int(self._before(source, position)), int(self._before(source, position + count))
        begun, ended = first // sampler.size, stop // sampler.size
        # It stands once in each epoch; in the first and the last one perhaps before or behind the positions.
        return ended - begun - (sampler.position(sample, begun) < first) + (sampler.position(sample, ended) < stop)


def _layout(shares: Sequence[int]) -> NDArray[np.int64]:
    """Return the source at each position of one period."""
    period, sources = sum(shares), len(shares)
    numbers = np.concatenate([np.arange(share, dtype=np.int64) for share in shares])
    owner, share = (np.repeat(values, shares) for values in (np.arange(sources), np.array(shares, dtype=np.int64)))
    first, stop = numbers * period // share, -(-(numbers + 1) * period // share)
    by_first = np.argsort(first, kind="stable")
    begins, keys = first[by_first].tolist(), (stop * sources + owner)[by_first].tolist()
    due: list[int] = []
    layout, entered = [], 0
    for place in range(period):
        while entered < period and begins[entered] <= place:
            heapq.heappush(due, keys[entered])
            entered += 1
        layout.append(heapq.heappop(due) % sources)
    return np.array(layout, dtype=np.int64)
