"""Batches of images, decoded and cropped by worker processes: a function of the data, the seed and the position."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stacey_dist.data.images.augment import Transform
from stacey_dist.data.images.batches import EvaluationBatches, TrainingBatches
from stacey_dist.data.images.image_set import ImageSet
from stacey_dist.data.images.workers import Workers
from stacey_dist.data.sampler import GlobalSampler
from stacey_dist.errors import SettingsError

TIMEOUT_SECONDS = 300.0


def never() -> bool:
    """Return False: nobody tells this process to stop."""
    return False


@dataclass(frozen=True)
class ImageBatch:
    """Images as the device gets them.

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
        sampler: the order of images; of their number.
        seed: of the random crops.
        global_batch_size: images in an update, on all processes together.
        process_index: of this process.
        num_processes: of the run; divides the batch.
        micro_batch_size: images in a batch; the last one of an update has what is left.
        workers: processes that prepare batches; 0 to prepare them when they are asked for.
        prefetch: batches that each worker prepares ahead.
        pin_memory: put batches into page-locked memory, for copies to a GPU beside its work.
        timeout: seconds after which a batch that the workers do not give is an error.
        stopping: whether this process was told to stop: then it does not wait for workers much longer.

    Raises:
        SettingsError: the batch cannot be shared out evenly, or a number is out of range.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: Transform,
        *,
        sampler: GlobalSampler,
        seed: int,
        global_batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        micro_batch_size: int,
        workers: int,
        prefetch: int = 2,
        pin_memory: bool = False,
        timeout: float = TIMEOUT_SECONDS,
        stopping: Callable[[], bool] = never,
    ) -> None:
        if sampler.size != len(images):
            raise ValueError(f"the sampler is of {sampler.size} samples and there are {len(images)} images")
        if global_batch_size < 1 or global_batch_size % num_processes:
            raise SettingsError(
                f"train.global_batch_size must be a multiple of the number of processes, {num_processes}, "
                f"got {global_batch_size}"
            )
        if micro_batch_size < 1:
            raise SettingsError(f"train.micro_batch_size must be at least 1, got {micro_batch_size}")
        self._images = images
        self._global_batch_size = global_batch_size
        share = global_batch_size // num_processes
        first = process_index * share
        # (offset in the update, number of images) of each of this process's batches.
        self._parts = [
            (at, min(micro_batch_size, first + share - at)) for at in range(first, first + share, micro_batch_size)
        ]
        self._schedule = _Schedule(global_batch_size, self._parts)
        self._workers = Workers(
            TrainingBatches(images, transform, sampler, seed),
            self._schedule,
            workers=workers,
            prefetch=prefetch,
            pin_memory=pin_memory,
            timeout=timeout,
            stopping=stopping,
        )
        # The update whose first batch comes next; None where that is not known.
        self._coming: int | None = None
        self._broken: set[int] = set()

    @property
    def broken(self) -> int:
        """How many broken images this process has met, each counted once."""
        return len(self._broken)

    def micro_batches(self, position: int) -> Iterator[ImageBatch]:
        """Yield this process's batches of the update whose first image is at global position ``position``.

        The batches that follow are prepared meanwhile. Another position than the next begins anew there.

        Raises:
            SettingsError: 1000 images in a row, or all, are broken; a file has gone; a worker died, or none gave a
                batch in time.
            StoppedWaitingError: none did after this process was told to stop.
        """
        if position != self._coming:
            self._coming = None
            self._schedule.start = position
            self._workers.start()
        for number in range(len(self._parts)):
            batch = _batch(self._workers.next(), self._images, self._broken)
            last = number == len(self._parts) - 1
            self._coming = position + self._global_batch_size if last else None
            yield batch

    def close(self) -> None:
        """End the workers. The loader can be used again, which starts others."""
        self._coming = None
        self._workers.close()


def evaluation_batches(
    images: ImageSet,
    transform: Transform,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    batch_size: int,
    workers: int,
    prefetch: int = 2,
    pin_memory: bool = False,
    timeout: float = TIMEOUT_SECONDS,
    stopping: Callable[[], bool] = never,
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
        workers: processes that prepare batches; 0 for none. They end with the iterator.
        prefetch: batches that each worker prepares ahead.
        pin_memory: put batches into page-locked memory.
        timeout: see `ImageLoader`.
        stopping: see `ImageLoader`.
        broken: the numbers of broken images that were named before, to which those named now are added.

    Raises:
        SettingsError: a file has gone; a worker died, or none gave a batch in time.
        StoppedWaitingError: none did after this process was told to stop.
    """
    places = -(-len(images) // num_processes)
    schedule = [(at, min(batch_size, places - at)) for at in range(0, places, batch_size)]
    task = EvaluationBatches(images, transform, process_index, num_processes)
    batches = Workers(
        task,
        schedule,
        workers=workers,
        prefetch=prefetch,
        pin_memory=pin_memory,
        timeout=timeout,
        stopping=stopping,
    )
    named = set() if broken is None else broken
    try:
        batches.start()
        while (answer := batches.next()) is not None:
            yield _batch(answer, images, named)
    finally:
        batches.close()


class _Schedule:
    """Where the batches of all updates from ``start`` on begin and how large they are, endlessly."""

    def __init__(self, global_batch_size: int, parts: list[tuple[int, int]]) -> None:
        self.start = 0
        self._global_batch_size = global_batch_size
        self._parts = parts

    def __iter__(self) -> Iterator[tuple[int, int]]:
        update = self.start
        while True:
            for offset, count in self._parts:
                yield update + offset, count
            update += self._global_batch_size


def _batch(answer: Any, images: ImageSet, named: set[int]) -> ImageBatch:
    if isinstance(answer, SettingsError):
        raise answer
    pixels, labels, broken = answer
    for i, reason in broken:
        if i not in named:
            named.add(i)
            print(f"data: left out a broken image, {images.name(i)}: {reason}", file=sys.stderr, flush=True)
    return ImageBatch(pixels.permute(0, 3, 1, 2), labels)
