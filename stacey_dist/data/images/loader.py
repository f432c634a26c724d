"""Batches of images, decoded and cropped by worker processes: a function of the data, the seed and the position."""

import contextlib
import itertools
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stacey_dist.data.images.augment import Transform
from stacey_dist.data.images.decode import BrokenImageError
from stacey_dist.data.images.image_set import ImageSet, read_pixels
from stacey_dist.data.images.workers import Place, Workers
from stacey_dist.data.sampler import GlobalSampler
from stacey_dist.data.tokens import IGNORED_LABEL
from stacey_dist.errors import InputError

_MOST_BROKEN = 1000
"""After this many consecutive broken images the run stops: the cause is then not the images."""

Broken = dict[int, str]
"""The numbers of broken images, and why they cannot be read."""


@dataclass(frozen=True)
class ImageBatch:
    """A batch of images, in the layout in which it is copied to the device.

    Attributes:
        pixels: uint8 of shape (n, 3, size, size), in channels_last memory format.
        labels: int64 of shape (n); -100 where an image does not count.
    """

    pixels: Tensor
    labels: Tensor


class ImageLoader:
    """This process's share of every update's images, prepared ahead by workers.

    The image at a place of an update, and its random crop, depend on the images, the seed and the place alone: not
    on workers, processes, micro-batches, or where the run began. A broken image gives its place to the next image
    that can be read, with that one's label, and is named on stderr.

    Args:
        images: to train on.
        transform: what is done to each.
        seed: of the order of the images and of the random crops.
        global_batch_size: images in an update, on all processes together.
        process_index: of this process.
        num_processes: of the run; divides the batch.
        micro_batch_size: images in a batch; the last one of an update has the rest.
        workers: prepare the batches.

    Raises:
        InputError: the batch cannot be shared out evenly, or a number is out of range.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: Transform,
        *,
        seed: int,
        global_batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        micro_batch_size: int,
        workers: Workers,
    ) -> None:
        if global_batch_size < 1 or global_batch_size % num_processes:
            raise InputError(
                f"global_batch_size: {global_batch_size} is not allowed; it must be a multiple of the number of "
                f"processes, {num_processes}"
            )
        if micro_batch_size < 1:
            raise InputError(f"micro_batch_size: {micro_batch_size} is not allowed; it must be at least 1")
        self._images, self._transform, self._seed, self._workers = images, transform, seed, workers
        self._order = GlobalSampler(len(images), seed)
        self._global_batch_size = global_batch_size
        share = global_batch_size // num_processes
        first = process_index * share
        # Where each of this process's batches begins in an update, and its number of images.
        self._parts = [
            (at, min(micro_batch_size, first + share - at)) for at in range(first, first + share, micro_batch_size)
        ]
        self._batches: Generator[tuple[Tensor, Tensor, Broken], None, None] | None = None
        # The update whose first batch comes next; None where that is not known.
        self._coming: int | None = None
        self._broken: set[int] = set()

    @property
    def broken(self) -> int:
        """How many broken images this process has met, each counted once."""
        return len(self._broken)

    def micro_batches(self, position: int) -> Iterator[ImageBatch]:
        """Yield this process's batches of the update whose first image is at global position ``position``.

        The batches that follow are prepared meanwhile. At any position but the next, the workers are restarted.

        Raises:
            InputError: 1000 images in a row, or all, are broken; a file has gone; a worker died, or gave no batch in
                time.
            StoppedWaitingError: no batch came after this process was asked to stop.
        """
        if self._batches is None or position != self._coming:
            self.close()
            places = _places(self._parts, position, self._global_batch_size)
            largest = self._parts[0][1]
            self._batches = self._workers.batches(self._fill, places, largest, self._transform.size)
        self._coming = None
        for number, _ in enumerate(self._parts, start=1):
            batch = _batch(next(self._batches), self._images, self._broken)
            if number == len(self._parts):
                self._coming = position + self._global_batch_size
            yield batch

    def close(self) -> None:
        """End the workers. The loader can be used again, which starts others."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _fill(self, first: int, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> Broken:
        """Fill a batch with the images at the global positions from ``first`` on."""
        broken: Broken = {}
        for row, sample in enumerate(self._order.samples(first, len(labels)).tolist()):
            i, image = self._readable(sample, broken)
            # The randomness of the place, so that an image which stands in for another is cropped otherwise.
            pixels[row] = self._transform.training(image, self._seed, (first + row) // len(self._images), sample)
            labels[row] = self._images.labels[i]
        return broken

    def _readable(self, sample: int, broken: Broken) -> tuple[int, NDArray[np.uint8]]:
        """Return the number and the pixels of the first image from ``sample`` on that is not broken."""
        count = min(len(self._images), _MOST_BROKEN)
        for i in ((sample + tried) % len(self._images) for tried in range(count)):
            try:
                return i, read_pixels(self._images, i)
            except BrokenImageError as error:
                broken[i] = reason = str(error)
        raise InputError(f"none of {count} images from {self._images.name(sample)} on can be read: {reason}")


def _places(parts: list[Place], position: int, global_batch_size: int) -> Iterator[Place]:
    """Yield the places of the batches of all updates from global position ``position`` on, endlessly."""
    # A function of its own, without the loader: the thread that copies batches would keep a forgotten loader alive.
    for update in itertools.count(position, global_batch_size):
        for offset, count in parts:
            yield update + offset, count


def evaluation_batches(
    images: ImageSet,
    transform: Transform,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    batch_size: int,
    workers: Workers,
    broken: set[int] | None = None,
) -> Iterator[ImageBatch]:
    """Yield this process's part of all images: those at process_index, process_index + num_processes, and so on.

    Every process gets as many batches, of the same sizes. Places left over, and broken images, are black, with label
    -100.

    Args:
        images: to evaluate on.
        transform: what is done to each.
        process_index: of this process.
        num_processes: of the run.
        batch_size: images in a batch.
        workers: prepare the batches. They end with the iterator.
        broken: the numbers of broken images that were named before, to which those named now are added.

    Raises:
        InputError: a file has gone; a worker died, or gave no batch in time.
        StoppedWaitingError: no batch came after this process was asked to stop.
    """

    def fill(start: int, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> Broken:
        broken: Broken = {}
        pixels[:], labels[:] = 0, IGNORED_LABEL
        for row in range(len(labels)):
            i = (start + row) * num_processes + process_index
            if i < len(images):
                try:
                    pixels[row] = transform.evaluation(read_pixels(images, i))
                    labels[row] = images.labels[i]
                except BrokenImageError as error:
                    broken[i] = str(error)
        return broken

    share = -(-len(images) // num_processes)
    places = [(at, min(batch_size, share - at)) for at in range(0, share, batch_size)]
    named = set() if broken is None else broken
    with contextlib.closing(workers.batches(fill, places, batch_size, transform.size)) as batches:
        for batch in batches:
            yield _batch(batch, images, named)


def _batch(prepared: tuple[Tensor, Tensor, Broken], images: ImageSet, named: set[int]) -> ImageBatch:
    """Return a batch that was prepared, after naming the broken images that are none of ``named``."""
    pixels, labels, broken = prepared
    for i in sorted(broken.keys() - named):
        named.add(i)
        print(f"data: left out a broken image, {images.name(i)}: {broken[i]}", file=sys.stderr, flush=True)
    return ImageBatch(pixels.permute(0, 3, 1, 2), labels)
