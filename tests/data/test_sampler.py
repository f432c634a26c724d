"""The global shuffle is a permutation, uniform, and a pure function."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacey_dist.data import GlobalSampler
from stacey_dist.errors import InputError

ORDER = [348, 561, 45, 36, 152, 474, 359, 271, 954, 222]
SEEDS = st.integers(min_value=-(2**70), max_value=2**70)


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 2**20))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    samples = GlobalSampler(size, seed).sample(np.arange(epoch * size, (epoch + 1) * size))
    assert samples.dtype == np.int64
    assert np.array_equal(np.sort(samples), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 2**16 - 1, 2**16, 2**16 + 1, 300_007])
def test_edge_sizes_are_permutations(size: int) -> None:
    assert np.array_equal(np.sort(GlobalSampler(size, 7).sample(np.arange(size))), np.arange(size))


@pytest.mark.parametrize("size", [2**31 + 11, 2**40 - 1, 2**40])
def test_large_sizes_stay_in_range_and_distinct(size: int) -> None:
    sampler = GlobalSampler(size, 3)
    samples = sampler.sample(np.arange(size - 50_000, size))
    assert len(np.unique(samples)) == 50_000
    assert samples.min() >= 0
    assert samples.max() < size
    assert samples.max() - samples.min() > size * 0.99


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 2**40), seed=SEEDS, start=st.integers(0, 2**50), count=st.integers(1, 40))
def test_independent_of_how_it_is_asked(size: int, seed: int, start: int, count: int) -> None:
    sampler = GlobalSampler(size, seed)
    together = sampler.sample(np.arange(start, start + count))
    alone = [GlobalSampler(size, seed).sample(k).item() for k in range(start, start + count)]
    assert together.tolist() == alone
    backwards = sampler.sample(np.arange(start, start + count)[::-1].astype(np.uint64).reshape(1, -1))
    assert backwards.shape == (1, count)
    assert backwards[0, ::-1].tolist() == alone


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 2**40), seed=SEEDS, position=st.integers(0, 2**50))
def test_where_a_sample_comes_in_an_epoch(size: int, seed: int, position: int) -> None:
    sampler = GlobalSampler(size, seed)
    assert sampler.position(sampler.sample(position).item(), position // size) == position


def test_step_samples_are_consecutive_positions() -> None:
    sampler = GlobalSampler(10, 1)
    # 7 does not divide 10: steps run over the ends of epochs.
    steps = np.concatenate([sampler.samples(7 * step, 7) for step in range(10)])
    assert np.array_equal(steps, sampler.sample(np.arange(70)))
    assert np.array_equal(np.bincount(steps), np.full(10, 7))


def test_epochs_and_seeds_differ() -> None:
    orders = [GlobalSampler(50, seed).sample(np.arange(50) + 50 * epoch) for seed in (0, 1, -1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_order_never_changes() -> None:
    """A changed order would break every run that resumes with a newer version."""
    assert GlobalSampler(1000, 42).sample(np.arange(995, 1005)).tolist() == ORDER


@pytest.mark.parametrize("size", [3, 5, 8, 13])
def test_uniform_over_seeds_and_epochs(size: int) -> None:
    """Chi-square of (position, sample), and of (sample at 0, sample at 1), below the 1 in 10^6 quantile."""
    trials = 20_000
    per_seed = 100
    orders = np.concatenate(
        [GlobalSampler(size, seed).sample(np.arange(size * per_seed)).reshape(per_seed, size) for seed in range(200)]
    )
    expected = trials / size
    for position in range(size):
        counts = np.bincount(orders[:, position], minlength=size)
        assert ((counts - expected) ** 2 / expected).sum() < 1.7 * size + 40, position
    pairs = np.bincount(orders[:, 0] * size + orders[:, 1], minlength=size * size).reshape(size, size)
    assert not pairs.diagonal().any()
    expected = trials / (size * (size - 1))
    off_diagonal = pairs[~np.eye(size, dtype=bool)]
    assert ((off_diagonal - expected) ** 2 / expected).sum() < 1.35 * size * (size - 1) + 50


def test_no_correlation_with_position_or_between_epochs() -> None:
    size = 10_000
    sampler = GlobalSampler(size, 5)
    first, second = (sampler.sample(np.arange(size) + epoch * size).astype(float) for epoch in (0, 1))
    for a, b in ((first, np.arange(size)), (first, second), (first[1:], first[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05


@pytest.mark.parametrize("size", [0, -1, 2**40 + 1])
def test_bad_size(size: int) -> None:
    with pytest.raises(InputError, match=str(size)):
        GlobalSampler(size, 0)


def test_negative_position() -> None:
    with pytest.raises(ValueError, match="-1"):
        GlobalSampler(5, 0).sample(-1)
