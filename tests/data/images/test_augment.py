"""Crops: the right distributions, the reference's pixels, randomness that is a function."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from stacey_dist.data import GlobalSampler
from stacey_dist.data.images import Transform
from stacey_dist.data.images.augment import central, random_rectangle, resize, resize_shorter_side
from stacey_dist.data.sampler import uniforms
from stacey_dist.errors import InputError
from tests.data.images.helpers import picture

NUMBERS = [4987112327058051, 5600416193200360, 7768474452795926]


def deviation(values: np.ndarray) -> float:
    """Kolmogorov and Smirnov's distance from uniform, times the root of the number: 2.5 once in 10^5."""
    ordered = np.sort(values)
    return float(np.abs(ordered - (np.arange(len(ordered)) + 0.5) / len(ordered)).max() * math.sqrt(len(ordered)))


def test_uniform_along_every_argument() -> None:
    streams = {
        "place": uniforms(1, 2, 3, 20_000),
        "sample": np.array([uniforms(1, 2, i, 3)[2] for i in range(5000)]),
        "epoch": np.array([uniforms(1, i, 3, 3)[0] for i in range(5000)]),
        "seed": np.array([uniforms(i, 2, 3, 3)[1] for i in range(5000)]),
    }
    for name, values in streams.items():
        assert deviation(values) < 2.5, name
        assert values.min() >= 0.0, name
        assert values.max() < 1.0, name
        pairs = np.bincount((values[:-1] * 8).astype(int) * 8 + (values[1:] * 8).astype(int), minlength=64)
        expected = (len(values) - 1) / 64
        assert ((pairs - expected) ** 2 / expected).sum() < 130, name


def test_arguments_are_independent() -> None:
    grid = np.array([[[uniforms(s, e, i, 4) for i in range(6)] for e in range(6)] for s in range(-3, 3)])
    assert len(np.unique(grid)) == grid.size
    several = [uniforms(0, e, i, 1)[0] for e in range(70) for i in range(70)]
    assert abs(np.corrcoef(several[:-1], several[1:])[0, 1]) < 0.06
    assert abs(np.corrcoef(several[:-70], several[70:])[0, 1]) < 0.06


def test_independent_of_the_order_of_samples() -> None:
    """The sampler hashes the same seed and epoch."""
    size = 4000
    order = GlobalSampler(size, 9).samples(3 * size, size)
    numbers = np.array([uniforms(9, 3, i, 2) for i in range(size)])
    for column in numbers.T:
        assert abs(np.corrcoef(column, order)[0, 1]) < 0.07
        assert abs(np.corrcoef(column[order], np.arange(size))[0, 1]) < 0.07


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40), sample=st.integers(0, 2**40), n=st.integers(0, 30)
)
def test_a_pure_function(seed: int, epoch: int, sample: int, n: int) -> None:
    numbers = uniforms(seed, epoch, sample, n)
    assert np.array_equal(numbers, uniforms(seed + 2**64, epoch, sample, 40)[:n])


def test_the_numbers_never_change() -> None:
    """Changed numbers would break every run that resumes with a newer version."""
    assert (uniforms(42, 7, 1000, 3) * 2**53).astype(int).tolist() == NUMBERS


def test_rectangles_have_the_distribution_of_random_resized_crop() -> None:
    height, width = 400, 400
    drawn = np.array([random_rectangle(height, width, 0.08, uniforms(0, 0, i, 23).tolist()) for i in range(6000)])
    top, left, h, w = drawn.T
    assert (top + h).max() <= height
    assert (left + w).max() <= width
    # Small shapes always fit, so that there nothing is drawn again: uniform area, log-uniform ratio.
    area, ratio = h * w / (height * width), np.log(w / h)
    small = area < 0.7
    assert deviation((area[small] - 0.08) / 0.62) < 2.5
    assert deviation((ratio[small] + math.log(4 / 3)) / (2 * math.log(4 / 3))) < 2.5
    generator = np.random.default_rng(0)
    for place, free in ((top, height - h), (left, width - w)):
        assert deviation((place + generator.random(len(place))) / (free + 1)) < 2.5
    assert abs(np.corrcoef(top / (height - h + 1), area)[0, 1]) < 0.05
    # All of the area only for a ratio of 1: drawn again otherwise.
    assert 0.60 < small.mean() < 0.80
    assert area.max() > 0.97


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 600),
    width=st.integers(1, 600),
    sample=st.integers(0, 10**6),
    scale=st.floats(0.001, 1.0, exclude_min=True),
)
def test_rectangles_lie_inside(height: int, width: int, sample: int, scale: float) -> None:
    top, left, h, w = random_rectangle(height, width, scale, uniforms(0, 0, sample, 23).tolist())
    assert 0 <= top < top + h <= height
    assert 0 <= left < left + w <= width


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((40, 1000), (0, 473, 40, 53)), ((1000, 40), (473, 0, 53, 40)), ((100, 110), (0, 0, 100, 110))],
)
def test_fallback_is_the_middle(shape: tuple[int, int], expected: tuple[int, int, int, int]) -> None:
    # The whole area and the widest ratio never fit.
    assert random_rectangle(*shape, 1.0, [0.3, 0.3, 0.3] + [0.9, 0.999] * 10) == expected


def resized_exactly(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.float64]:
    """Weigh the pixels by triangles as wide as a pixel of the smaller of both pictures, in float64."""

    def weights(count: int, to: int) -> NDArray[np.float64]:
        centers = (np.arange(to) + 0.5)[:, None] * count / to
        triangles = np.maximum(0.0, 1.0 - np.abs(np.arange(count) + 0.5 - centers) / max(count / to, 1.0))
        return triangles / triangles.sum(1, keepdims=True)

    rows, columns = weights(pixels.shape[0], height), weights(pixels.shape[1], width)
    return np.einsum("ah,hwc,bw->abc", rows, pixels.astype(np.float64), columns)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 150), width=st.integers(1, 150), to=st.tuples(st.integers(1, 90), st.integers(1, 90)))
def test_resize_is_pillows_antialiased_bilinear(height: int, width: int, to: tuple[int, int]) -> None:
    pixels = picture(height, width)
    reference = Image.fromarray(pixels).resize(to[::-1], Image.Resampling.BILINEAR)
    resized = resize(pixels, *to)
    assert resized.shape == (*to, 3)
    assert resized.dtype == np.uint8
    # Half a last place for the rounding after each of two passes, one for each dimension; the weights have 16 bits.
    assert np.abs(resized - resized_exactly(pixels, *to)).max() <= 1.01
    # Pillow rounds so, too: seldom both in opposite directions.
    difference = np.abs(resized.astype(int) - np.asarray(reference))
    assert difference.max() <= 2
    assert np.count_nonzero(difference > 1) <= 1 + difference.size // 1000
    view = pixels[height // 3 :, width // 4 :]
    assert np.array_equal(resize(view, *to), resize(view.copy(), *to))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((375, 500), (256, 341)),
        ((500, 375), (341, 256)),
        ((256, 300), (256, 300)),
        ((375, 499), (256, 340)),
        ((3, 1), (768, 256)),
    ],
)
def test_shorter_side(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resize_shorter_side(picture(*shape), 256).shape == (*expected, 3)


def test_a_line_of_pixels_is_not_enlarged_as_a_whole() -> None:
    line = np.arange(3 * 60_000).astype(np.uint8).reshape(1, 60_000, 3)
    transform = Transform(8, "random_resized", flip=False, eval_resize=16)
    assert np.array_equal(transform.evaluation(line), transform.evaluation(line[:, 29_950:30_050]))
    column = line.transpose(1, 0, 2)
    assert np.array_equal(transform.evaluation(column), transform.evaluation(line).transpose(1, 0, 2))


def test_central() -> None:
    pixels = picture(11, 20)
    assert np.array_equal(central(pixels, 6), pixels[2:8, 7:13])
    padded = central(pixels, 14)
    assert padded.shape == (14, 14, 3)
    assert np.array_equal(padded[1:12], pixels[:, 3:17])
    assert not padded[0].any()
    assert not padded[12:].any()


def test_training_is_a_crop_resized_and_mirrored() -> None:
    pixels = picture(90, 120)
    mirrored = 0
    for sample in range(40):
        numbers = uniforms(5, 1, sample, 23).tolist()
        top, left, h, w = random_rectangle(90, 120, 0.08, numbers)
        crop = Image.fromarray(pixels[top : top + h, left : left + w]).resize((33, 33), Image.Resampling.BILINEAR)
        result = Transform(33, "random_resized", flip=True).training(pixels, 5, 1, sample)
        assert result.shape == (33, 33, 3)
        plain = Transform(33, "random_resized", flip=False).training(pixels, 5, 1, sample)
        assert np.abs(plain.astype(int) - np.asarray(crop)).max() <= 1
        flipped = not np.array_equal(result, plain)
        assert np.array_equal(result, plain[:, ::-1] if flipped else plain)
        mirrored += flipped
    assert 8 <= mirrored <= 32


def test_padded_crop_takes_every_place_equally() -> None:
    size = 16
    pixels = np.arange(1, size * size + 1, dtype=np.int64).reshape(size, size, 1).repeat(3, 2)
    pixels = (pixels % 255 + 1).astype(np.uint8)
    around = np.pad(pixels, ((2, 2), (2, 2), (0, 0)))
    places = {around[y : y + size, x : x + size].tobytes(): (y, x) for y in range(5) for x in range(5)}
    transform = Transform(size, "padded", flip=False)
    counts = Counter(places[transform.training(pixels, 1, 0, i).tobytes()] for i in range(2500))
    assert len(counts) == 25
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 70
    mirrored = Transform(size, "padded", flip=True)
    flips = [
        not np.array_equal(mirrored.training(pixels, 1, 0, i), transform.training(pixels, 1, 0, i)) for i in range(400)
    ]
    assert 140 < sum(flips) < 260
    tops = [places[transform.training(pixels, 1, 0, i).tobytes()][0] for i in range(400)]
    assert abs(np.corrcoef(flips, tops)[0, 1]) < 0.2


@pytest.mark.parametrize("crop", ["padded", "none"])
@pytest.mark.parametrize("shape", [(32, 32), (28, 28), (48, 64), (64, 33)])
def test_other_sizes_are_fitted(crop: str, shape: tuple[int, int]) -> None:
    pixels = picture(*shape)
    transform = Transform(32, crop, flip=False)  # type: ignore[arg-type]
    fitted = central(resize_shorter_side(pixels, 32), 32)
    assert np.array_equal(transform.evaluation(pixels), fitted)
    if crop == "none":
        assert np.array_equal(transform.training(pixels, 0, 0, 0), fitted)


def test_evaluation() -> None:
    pixels = picture(75, 100)
    expected = Image.fromarray(pixels).resize((85, 64), Image.Resampling.BILINEAR).crop((14, 4, 70, 60))
    result = Transform(56, "random_resized", True, eval_resize=64).evaluation(pixels)
    assert np.abs(result.astype(int) - np.asarray(expected)).max() <= 1
    assert np.array_equal(Transform(56, "random_resized", True).evaluation(pixels), pixels[10:66, 22:78])
    assert Transform(224, "random_resized", True, eval_resize=32).evaluation(pixels).shape == (224, 224, 3)


def test_global_generators_do_not_matter_and_are_left_alone() -> None:
    transform = Transform(20, "random_resized", flip=True)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
        results.append([transform.training(picture(), 3, 0, i).tobytes() for i in range(5)])
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    assert results[0] == results[1]
    assert len(set(results[0])) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(size=0), "size: 0 is not allowed; it must be at least 1"),
        (dict(crop="center"), "crop: 'center' is not allowed; it must be random_resized, padded or none"),
        (dict(min_scale=0.0), "min_scale: 0.0 is not allowed; it must be above 0 and at most 1"),
        (dict(eval_resize=0), "eval_resize: 0 is not allowed; it must be at least 1 or None"),
    ],
)
def test_bad_settings(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Transform(**dict(size=8, crop="none", flip=True) | change)
