"""What worker processes do: decode and crop the images of a batch."""

import atexit
import signal
from collections.abc import Callable
from multiprocessing import util
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stacey_dist.data.images.augment import Transform
from stacey_dist.data.images.decode import BrokenImageError, read_pixels
from stacey_dist.data.images.image_set import ImageSet
from stacey_dist.data.sampler import GlobalSampler
from stacey_dist.data.tokens import IGNORED_LABEL
from stacey_dist.errors import SettingsError

_MOST_BROKEN = 1000
"""So many broken images one after another: it is not they that are broken."""

Answer = tuple[Tensor, Tensor, list[tuple[int, str]]]
"""What a worker sends: pixels (n, size, size, 3), labels, and the broken images it met, as (number, reason)."""


class TrainingBatches(Dataset):
    """The batch at global positions [first, first + count), made in a worker."""

    def __init__(self, images: ImageSet, transform: Transform, sampler: GlobalSampler, seed: int) -> None:
        self.images, self.transform, self.sampler, self.seed = images, transform, sampler, seed

    def __getitem__(self, place: tuple[int, int]) -> Answer | SettingsError:
        first, count = place
        size = self.transform.size
        pixels = torch.empty((count, size, size, 3), dtype=torch.uint8)
        labels = torch.empty(count, dtype=torch.int64)
        broken: list[tuple[int, str]] = []
        rows = pixels.numpy()
        for row, sample in enumerate(self.sampler.samples(first, count).tolist()):
            epoch = (first + row) // len(self.images)
            for tried in range(min(len(self.images), _MOST_BROKEN)):
                i = (sample + tried) % len(self.images)
                try:
                    image = read_pixels(self.images, i)
                except BrokenImageError as error:
                    broken.append((i, str(error)))
                    continue
                except OSError as error:
                    return _gone(self.images, i, error)
                # The randomness of the place, so that an image which stands in for another is cropped otherwise.
                rows[row] = self.transform.training(image, self.seed, epoch, sample)
                labels[row] = int(self.images.labels[i])
                break
            else:
                return SettingsError(
                    f"data: none of {tried + 1} images from {self.images.name(sample)} on can be read: {broken[-1][1]}"
                )
        return pixels, labels, broken


class EvaluationBatches(Dataset):
    """The batch of a process's places [start, start + count), made in a worker."""

    def __init__(self, images: ImageSet, transform: Transform, process_index: int, num_processes: int) -> None:
        self.images, self.transform = images, transform
        self.process_index, self.num_processes = process_index, num_processes

    def __getitem__(self, place: tuple[int, int]) -> Answer | SettingsError:
        start, count = place
        size = self.transform.size
        pixels = torch.zeros((count, size, size, 3), dtype=torch.uint8)
        labels = torch.full((count,), IGNORED_LABEL)
        broken: list[tuple[int, str]] = []
        rows = pixels.numpy()
        for row in range(count):
            i = (start + row) * self.num_processes + self.process_index
            if i < len(self.images):
                try:
                    rows[row] = self.transform.evaluation(read_pixels(self.images, i))
                    labels[row] = int(self.images.labels[i])
                except BrokenImageError as error:
                    broken.append((i, str(error)))
                except OSError as error:
                    return _gone(self.images, i, error)
        return pixels, labels, broken


def _gone(images: ImageSet, i: int, error: OSError) -> SettingsError:
    """What a worker returns: what it raises arrives as pages of its stack."""
    return SettingsError(f"data: {images.name(i)} can no longer be read: {error}")


def data_loader(dataset: Dataset, places: Any, workers: int, prefetch: int, pin_memory: bool) -> DataLoader:
    """Return a loader whose workers run ahead through ``dataset[place]`` in the order of ``places``.

    Raises:
        SettingsError: workers or prefetch is out of range.
    """
    if workers < 0:
        raise SettingsError(f"data.workers must be at least 0, got {workers}")
    if prefetch < 1:
        raise SettingsError(f"data.prefetch must be at least 1, got {prefetch}")
    return DataLoader(
        dataset,
        sampler=places,
        batch_size=None,  # a place is a whole batch
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        # Not a fork server, Python's default from 3.14 on: it ends by the SIGTERM that a scheduler sends to everyone,
        # and the workers with it. They share the index of the images, too.
        multiprocessing_context="fork" if workers else None,
        # Its own: workers' seeds would be drawn from the training process's generator.
        generator=torch.Generator(),
    )


def start(loader: DataLoader) -> Any:
    """Return an iterator over a loader, whose workers no signal meets before they ignore it."""
    # Workers inherit what is blocked; what comes meanwhile reaches this process afterwards.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ending(batches: Any, owner: object = None) -> Callable[[], None]:
    """Return what ends the workers of a running iterator over a loader, if it has any.

    It is called by itself when ``owner`` is forgotten, and at the latest when this process ends: multiprocessing would
    then send the signal that they ignore, and wait for them for ever.
    """
    # Before the queues by which workers are told to end: those close at 10.
    finalizer = util.Finalize(owner, _shut_down, (batches,), exitpriority=100)
    # At the end of a program torch may give up its workers before multiprocessing calls its finalizers: this comes
    # before both. In a child of multiprocessing there are the finalizers only.
    atexit.register(finalizer)

    def end() -> None:
        atexit.unregister(finalizer)
        finalizer()

    return end


def _shut_down(batches: Any) -> None:
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()


def _as_it_is(answer: Any) -> Any:
    return answer


def _ignore_signals(_worker: int) -> None:
    """Let the training process finish its step and save: a scheduler, or Ctrl-C, signals all processes at once.

    A worker ends when it is told to, or within seconds of its parent, which torch's loop in it looks for.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
