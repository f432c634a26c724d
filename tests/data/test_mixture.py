"""The order over several sources: exact shares at every position, each source's own order, a pure function."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacey_dist.data import GlobalSampler, MixedSampler
from stacey_dist.data.mixture import LARGEST_PERIOD, shares_of
from stacey_dist.errors import InputError

SHARES = st.lists(st.integers(1, 60), min_size=1, max_size=9)
FAR = 10**12


@settings(max_examples=30, deadline=None)
@given(shares=SHARES, periods=st.integers(0, FAR))
def test_counts_are_within_one_of_their_shares_after_any_number_of_samples(shares: list[int], periods: int) -> None:
    period = sum(shares)
    first = periods * period
    mixed = MixedSampler([7] * len(shares), shares, 0)
    sources, samples = mixed.samples(first, period + 3)
    counts = [periods * share for share in shares]
    assert mixed.counts(first) == counts
    for n, (source, sample) in enumerate(zip(sources.tolist(), samples.tolist(), strict=True), start=first + 1):
        assert sample == mixed.samplers[source].sample(counts[source])
        counts[source] += 1
        assert mixed.counts(n) == counts
        assert sum(counts) == n
        # |count - share / period * n| < 1 in whole numbers, which Python does not round.
        assert all(abs(count * period - share * n) < period for count, share in zip(counts, shares, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 2**40), min_size=1, max_size=5),
    data=st.data(),
    seed=st.integers(-(2**70), 2**70),
    position=st.integers(0, FAR),
    count=st.integers(1, 40),
)
def test_each_source_has_its_own_order(
    sizes: list[int], data: st.DataObject, seed: int, position: int, count: int
) -> None:
    shares = data.draw(st.lists(st.integers(1, 100), min_size=len(sizes), max_size=len(sizes)))
    mixed = MixedSampler(sizes, shares, seed)
    sources, samples = mixed.samples(position, count)
    before, after = mixed.counts(position), mixed.counts(position + count)
    for i, size in enumerate(sizes):
        of_source = GlobalSampler(size, seed + i).samples(before[i], after[i] - before[i])
        assert samples[sources == i].tolist() == of_source.tolist()
        for sample in {*of_source.tolist()[:2], 0}:
            assert mixed.times(i, sample, position, count) == of_source.tolist().count(sample)
    # Independent of how it is asked.
    alone = [MixedSampler(sizes, shares, seed).samples(k, 1) for k in range(position, position + min(count, 3))]
    assert [(int(s[0]), int(w[0])) for s, w in alone] == list(zip(sources.tolist(), samples.tolist(), strict=True))[:3]


def test_one_source_has_the_order_of_a_global_sampler() -> None:
    sources, samples = MixedSampler([1000], [1], 42).samples(995, 3000)
    assert not sources.any()
    assert samples.tolist() == GlobalSampler(1000, 42).samples(995, 3000).tolist()


def test_the_order_never_changes() -> None:
    """A changed order would break every run that resumes with a newer version."""
    sources, samples = MixedSampler([1000, 50, 7], [5, 3, 2], 42).samples(2 * 10**9 + 4, 12)
    assert sources.tolist() == [0, 1, 0, 1, 0, 2, 0, 1, 0, 2, 0, 1]
    assert samples.tolist() == [229, 18, 717, 43, 561, 3, 62, 3, 287, 0, 338, 14]


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.floats(1e-4, 1e4) | st.integers(1, 10**7).map(float), min_size=1, max_size=8))
def test_shares_are_the_weights(weights: list[float]) -> None:
    shares = shares_of(weights)
    period, total = sum(shares), sum(Fraction(str(weight)) for weight in weights)
    assert period <= LARGEST_PERIOD
    parts = [Fraction(str(weight)) / total for weight in weights]
    if period < LARGEST_PERIOD:
        assert [Fraction(share, period) for share in shares] == parts
    else:
        assert all(abs(share - part * period) < 1 for share, part in zip(shares, parts, strict=True))


def test_shares_of_weights_as_people_write_them() -> None:
    assert shares_of([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert shares_of([1, 1.0]) == [1, 1]
    assert shares_of([3]) == [1]
    assert shares_of([1e-9, 1]) == [0, LARGEST_PERIOD]
    assert sum(shares_of([0.333333, 0.666667])) == 10**6


@pytest.mark.parametrize("shares", [[], [1], [1, 0], [1, -1], [LARGEST_PERIOD, 1]])
def test_bad_shares(shares: list[int]) -> None:
    with pytest.raises(InputError, match=r"^shares: \["):
        MixedSampler([10, 20], shares, 0)


def test_the_largest_period_is_laid_out_in_seconds() -> None:
    mixed = MixedSampler([10] * 3, [1, 2, LARGEST_PERIOD - 3], 0)
    assert mixed.counts(FAR * LARGEST_PERIOD) == [FAR, 2 * FAR, FAR * (LARGEST_PERIOD - 3)]
    assert mixed.counts(LARGEST_PERIOD // 2) == [0, 1, LARGEST_PERIOD // 2 - 1]
