"""Batches are a function of images, seed and position: whoever prepares them, and wherever one begins."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stacey_dist.data import GlobalSampler
from stacey_dist.data.images import (
    IGNORED_LABEL,
    ArrayImages,
    ImageBatch,
    ImageLoader,
    ImageSet,
    Transform,
    Workers,
    evaluation_batches,
)
from stacey_dist.errors import InputError
from tests.data.images.helpers import EncodedImages, KnownBroken, numbered, picture

ROOT = Path(__file__).parents[3]
SEED = 3
CROPPED = Transform(12, "random_resized", flip=True)
WHOLE = Transform(8, "none", flip=False)


def photos(count: int = 13) -> ArrayImages:
    pixels = np.stack([picture(20, 26, i) for i in range(count)])
    return ArrayImages(pixels, np.arange(count) % 3, ["a", "b", "c"])


def make(images: ImageSet, transform: Transform = CROPPED, **changes: Any) -> ImageLoader:
    options: dict[str, Any] = dict(global_batch_size=6, micro_batch_size=6, workers=Workers()) | changes
    return ImageLoader(images, transform, seed=SEED, **options)


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def joined(batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(batches)
    return torch.cat([batch.pixels for batch in batches]), torch.cat([batch.labels for batch in batches])


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches() -> None:
    images = photos()
    batches = list(make(images, global_batch_size=10, micro_batch_size=4).micro_batches(10))
    assert [len(batch.labels) for batch in batches] == [4, 4, 2]
    order = GlobalSampler(13, SEED)
    for batch in batches:
        assert batch.pixels.dtype == torch.uint8
        assert batch.pixels.shape[1:] == (3, 12, 12)
        assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == torch.int64
    pixels, labels = joined(batches)
    for row, k in enumerate(range(10, 20)):
        sample = order.sample(k)
        expected = CROPPED.training(images.pixels[sample], SEED, k // 13, sample)
        assert np.array_equal(pixels[row].permute(1, 2, 0).numpy(), expected)
        assert labels[row] == sample % 3


@settings(max_examples=25, deadline=None)
@given(processes=st.sampled_from([1, 2, 3, 4, 6, 12]), micro=st.integers(1, 14), update=st.integers(0, 40))
def test_processes_and_micro_batches_do_not_matter(processes: int, micro: int, update: int) -> None:
    images = photos()
    position = update * 12
    shared: dict[str, Any] = dict(global_batch_size=12, num_processes=processes, micro_batch_size=micro)
    parts = [make(images, **shared, process_index=i).micro_batches(position) for i in range(processes)]
    whole = make(images, global_batch_size=12, micro_batch_size=12).micro_batches(position)
    assert equal(joined(itertools.chain(*parts)), joined(whole))


def test_workers_and_restarts_do_not_matter() -> None:
    images = EncodedImages(photos(), {4})
    alone = make(images, micro_batch_size=6)
    expected = {position: joined(alone.micro_batches(position)) for position in range(0, 60, 6)}
    before = children()
    loader = make(images, micro_batch_size=4, workers=Workers(2, prefetch=3))
    for position in (0, 6, 12, 36, 42, 6, 12, 54, 54):
        assert equal(joined(loader.micro_batches(position)), expected[position])
        assert len(children() - before) == 2
    # One that is left in the middle begins anew; one whose last batch was taken goes on.
    abandoned = loader.micro_batches(0)
    next(abandoned)
    assert equal(joined(loader.micro_batches(6)), expected[6])
    last = loader.micro_batches(12)
    workers = children()
    assert equal(joined([next(last), next(last)]), expected[12])
    assert equal(joined(loader.micro_batches(18)), expected[18])
    assert children() == workers
    assert loader.broken == alone.broken == 1
    loader.close()
    assert children() == before
    assert equal(joined(loader.micro_batches(18)), expected[18])
    loader.close()
    loader.close()


def test_batches_are_kept_though_their_place_is_filled_again() -> None:
    loader = make(photos(), micro_batch_size=1, workers=Workers(2, prefetch=1))
    kept = [joined(loader.micro_batches(position)) for position in range(0, 60, 6)]
    alone = make(photos())
    assert all(equal(batch, joined(alone.micro_batches(6 * i))) for i, batch in enumerate(kept))
    loader.close()


def test_the_training_process_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 1):
        loader = make(photos(), workers=Workers(workers))
        list(loader.micro_batches(0))
        list(loader.micro_batches(30))
        loader.close()
        list(evaluation_batches(photos(), CROPPED, batch_size=20, workers=Workers(workers)))
    assert torch.equal(torch.get_rng_state(), before)


def test_broken_images_give_their_place_to_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    images = EncodedImages(numbered(9), {2, 3, 8})
    loader = make(images, WHOLE, global_batch_size=9)
    for epoch in range(3):
        pixels, labels = joined(loader.micro_batches(9 * epoch))
        stand_in = {2: 4, 3: 4, 8: 0}
        expected = [stand_in.get(i, i) for i in GlobalSampler(9, SEED).samples(9 * epoch, 9).tolist()]
        assert pixels[:, 0, 0, 0].tolist() == expected
        assert labels.tolist() == [i % 3 for i in expected]
    assert loader.broken == 3
    lines = capsys.readouterr().err.splitlines()
    start = "data: left out a broken image, image"
    assert [line.split(": none of")[0] for line in sorted(lines)] == [f"{start} {i}" for i in (2, 3, 8)]


@pytest.mark.parametrize("workers", [0, 1])
def test_all_broken(workers: int) -> None:
    loader = make(KnownBroken(np.zeros((5, 8, 8, 3), np.uint8), np.zeros(5, int), ["a"]), workers=Workers(workers))
    with pytest.raises(InputError, match=r"^none of 5 images from image \d on can be read: known$"):
        list(loader.micro_batches(0))
    loader.close()
    batches = evaluation_batches(loader._images, WHOLE, batch_size=2, workers=Workers(workers))
    assert all((batch.labels == IGNORED_LABEL).all() for batch in batches)  # another process may have others


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 23), processes=st.integers(1, 5), size=st.integers(1, 9))
def test_evaluation_covers_every_image_once(count: int, processes: int, size: int) -> None:
    images = numbered(count)
    options: dict[str, Any] = dict(num_processes=processes, batch_size=size, workers=Workers())
    per_process = [list(evaluation_batches(images, WHOLE, process_index=i, **options)) for i in range(processes)]
    shapes = [[batch.pixels.shape for batch in batches] for batches in per_process]
    assert all(shape == shapes[0] for shape in shapes)
    assert sum(shape[0] for shape in shapes[0]) == -(-count // processes)
    pixels, labels = joined(itertools.chain(*per_process))
    counts = labels != IGNORED_LABEL
    seen = pixels[counts][:, 0, 0, 0]
    assert sorted(seen.tolist()) == list(range(count))
    assert torch.equal(labels[counts], seen.long() % 3)
    assert not pixels[~counts].any()


def test_evaluation_with_workers_and_broken_images(capsys: pytest.CaptureFixture[str]) -> None:
    images = EncodedImages(numbered(10), {1, 7})
    named: set[int] = set()

    def evaluate(workers: int) -> Any:
        return joined(evaluation_batches(images, WHOLE, batch_size=3, workers=Workers(workers), broken=named))

    alone = evaluate(0)
    assert named == {1, 7}
    assert alone[1].tolist() == [0, -100, 2, 0, 1, 2, 0, -100, 2, 0]
    assert not alone[0][1].any()
    before = children()
    assert equal(evaluate(2), alone)
    assert children() <= before
    assert capsys.readouterr().err.count("left out a broken image") == 2


def test_abandoned_evaluation_ends_its_workers() -> None:
    before = children()
    batches = evaluation_batches(numbered(40), WHOLE, batch_size=2, workers=Workers(2))
    assert isinstance(next(batches), ImageBatch)
    assert len(children() - before) == 2
    batches.close()  # type: ignore[attr-defined]
    assert children() <= before


class Missing(ArrayImages):
    def read(self, i: int) -> Any:
        return Path("/nowhere/image.jpg").read_bytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_has_gone_is_an_error(workers: int) -> None:
    missing = Missing(np.zeros((5, 8, 8, 3), np.uint8), np.zeros(5, int), ["a"])
    loader = make(missing, workers=Workers(workers))
    with pytest.raises(InputError, match=r"^image \d can no longer be read: .*/nowhere/image\.jpg'$"):
        next(loader.micro_batches(0))
    loader.close()
    with pytest.raises(InputError, match=r"^image 0 can no longer be read: .*/nowhere/image\.jpg'$"):
        next(evaluation_batches(missing, WHOLE, batch_size=2, workers=Workers(workers)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_processes=4), r"global_batch_size: 6 is not allowed; it must be a multiple of the number of .* 4$"),
        (dict(global_batch_size=0), r"global_batch_size: 0 is not allowed"),
        (dict(micro_batch_size=0), r"micro_batch_size: 0 is not allowed; it must be at least 1"),
    ],
)
def test_bad_sizes(change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        make(photos(), **change)
