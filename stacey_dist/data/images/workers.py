"""Worker processes that prepare batches ahead, in memory that they share with the training process.

They are not those of torch's DataLoader, for three reasons. DataLoader waits without end for a worker that hangs while
it hands a batch over, whatever its timeout (seen with torch 2.13). It raises the death of a worker wherever the
training process is, in the middle of a save too. And it keeps batches in /dev/shm, of which a container has 64 MB.
"""

import itertools
import math
import mmap
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import connection, context, util
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stacey_dist.data.processes import FORK, death, end_with_parent
from stacey_dist.errors import InputError, StoppedWaitingError

Place = tuple[int, int]
"""Where a batch begins, and its number of images."""

Fill = Callable[[int, NDArray[np.uint8], NDArray[np.int64]], Any]
"""Fills the pixels and labels of the batch that begins at a place, and returns a report for the training process, which
can be pickled. An InputError goes there too."""

_POLL_SECONDS = 0.5
_STOP_SECONDS = 10.0
"""How long a batch is waited for after a request to stop: schedulers kill 30 seconds after theirs."""


@dataclass(frozen=True)
class Workers:
    """How many processes prepare batches, and how they are waited for.

    Attributes:
        count: processes; with 0 the training process prepares each batch when it is asked for.
        prefetch: batches that each of them is ahead.
        pin_memory: put batches into page-locked memory, for copies to a GPU beside its work.
        timeout: seconds after which a batch that does not come is an error.
        stopping: returns whether this process was asked to stop: then it waits ten seconds at most.

    Raises:
        InputError: a value is out of range.
    """

    count: int = 0
    prefetch: int = 2
    pin_memory: bool = False
    timeout: float = 300.0
    stopping: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        if self.count < 0:
            raise InputError(f"workers: {self.count} is not allowed; it must be at least 0")
        if self.prefetch < 1:
            raise InputError(f"prefetch: {self.prefetch} is not allowed; it must be at least 1")
        if not self.timeout > 0:
            raise InputError(f"timeout: {self.timeout} is not allowed; it must be above 0")

    def check_memory(self, images: int, size: int) -> None:
        """Raise InputError where there is no memory for batches of ``images`` images, ``size`` pixels high and wide."""
        self._workers(images, size)

    def batches(
        self, fill: Fill, places: Iterable[Place], images: int, size: int
    ) -> Generator[tuple[Tensor, Tensor, Any], None, None]:
        """Yield the pixels (n, size, size, 3), the labels (n) and the report of every batch, in order.

        The processes end with the iterator, and with this process, however it ends.

        Args:
            fill: prepares a batch.
            places: of the batches. Every process goes through them by itself.
            images: in the largest batch.
            size: height and width of the images.

        Raises:
            InputError: `fill` did; a process died or gave no batch in time; there is no memory for the batches.
            StoppedWaitingError: no batch came after this process was asked to stop.
        """
        if not self.count:
            for start, count in places:
                pixels, labels = self._empty(count, size)
                yield pixels, labels, fill(start, pixels.numpy(), labels.numpy())
            return
        workers = self._workers(images, size)
        kill = util.Finalize(None, _kill, (workers,), exitpriority=100)  # before multiprocessing waits for its children
        thread = ThreadPoolExecutor(1, "copy a batch")
        try:
            _start(workers, fill, places)
            # One ahead of the caller, so that the copy takes place beside its work.
            copies = self._copies(workers, places, size)
            coming = thread.submit(next, copies, None)
            while (batch := coming.result()) is not None:
                coming = thread.submit(next, copies, None)
                yield batch
        finally:
            kill()
            thread.shutdown()
            for worker in workers:
                worker.close()

    def _workers(self, images: int, size: int) -> "list[_Worker]":
        return [_Worker(self, images, size) for _ in range(self.count)]

    def _copies(
        self, workers: "list[_Worker]", places: Iterable[Place], size: int
    ) -> Generator[tuple[Tensor, Tensor, Any], None, None]:
        for number, (_, count) in enumerate(places):
            worker, slot = workers[number % self.count], number // self.count % self.prefetch
            report = self._receive(worker)
            pixels, labels = self._empty(count, size)
            pixels.copy_(torch.from_numpy(worker.pixels[slot, :count]))
            labels.copy_(torch.from_numpy(worker.labels[slot, :count]))
            worker.fill_another()
            yield pixels, labels, report

    def _empty(self, count: int, size: int) -> tuple[Tensor, Tensor]:
        pixels = torch.empty((count, size, size, 3), dtype=torch.uint8, pin_memory=self.pin_memory)
        return pixels, torch.empty(count, dtype=torch.int64, pin_memory=self.pin_memory)

    def _receive(self, worker: "_Worker") -> Any:
        begun, asked_to_stop = time.monotonic(), None
        while not worker.reports.poll(_POLL_SECONDS):
            now = time.monotonic()
            if now - begun > self.timeout:
                raise InputError(
                    f"timeout: no batch came from the worker processes within {self.timeout:g} s; a disk that does not "
                    "answer, or larger images than the limit allows for"
                )
            if asked_to_stop is None and self.stopping():
                asked_to_stop = now
            if asked_to_stop is not None and now - asked_to_stop > _STOP_SECONDS:
                raise StoppedWaitingError("data: asked to stop, and no batch came from the worker processes")
        try:
            report = worker.reports.recv()
        except (EOFError, ConnectionError) as error:
            raise worker.death() from error
        if isinstance(report, InputError):
            raise report
        return report


class _Worker:
    """A process, and memory that it shares with this one for the batches that it is ahead."""

    def __init__(self, settings: Workers, images: int, size: int) -> None:
        shape = (settings.prefetch, images, size, size, 3)
        try:
            # The system gives memory as it is filled.
            self.pixels = np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)
            self.labels = np.frombuffer(mmap.mmap(-1, 8 * math.prod(shape[:2])), np.int64).reshape(shape[:2])
        except (OSError, OverflowError) as error:
            raise InputError(
                f"prefetch: {settings.prefetch} batches of {math.prod(shape[1:]) / 1e6:.1f} MB for each of "
                f"{settings.count} worker processes are more than there is memory for; lower it, `workers` or "
                "`micro_batch_size`"
            ) from error
        self._prefetch = settings.prefetch
        self._process: context.ForkProcess | None = None

    def start(self, fill: Fill, places: Iterable[Place]) -> None:
        """Start the process."""
        # How many batches may be filled. A semaphore of Python's lies in /dev/shm.
        self._free = os.eventfd(self._prefetch, os.EFD_SEMAPHORE)
        self.reports, sender = connection.Pipe(duplex=False)
        process = FORK.Process(target=self._work, args=(fill, places, sender), daemon=True)
        process.start()
        self._process = process  # which `kill` may end
        sender.close()  # so that the pipe ends with the process

    def _work(self, fill: Fill, places: Iterable[Place], sender: connection.Connection) -> None:
        end_with_parent()
        torch.set_num_threads(1)
        for slot, (start, count) in zip(itertools.cycle(range(self._prefetch)), places, strict=False):
            os.eventfd_read(self._free)
            try:
                report = fill(start, self.pixels[slot, :count], self.labels[slot, :count])
            except InputError as error:
                report = error
            sender.send(report)

    def death(self) -> InputError:
        """Return the error that says how the process ended."""
        assert self._process is not None
        self._process.join()
        return death(self._process, "`workers`, `prefetch` or `micro_batch_size`")

    def fill_another(self) -> None:
        """Let the process fill the memory of a batch again."""
        os.eventfd_write(self._free, 1)

    def kill(self) -> None:
        """End the process if it runs. It only reads, so nothing is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def close(self) -> None:
        """Close the pipe and the counter of a process that has ended."""
        if self._process is not None:
            self.reports.close()
            os.close(self._free)


def _start(workers: list[_Worker], fill: Fill, places: Iterable[Place]) -> None:
    # A scheduler, or Ctrl-C, signals all processes at once. Workers inherit what is blocked, so that they keep giving
    # batches while the training process finishes its update and saves.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        for number, worker in enumerate(workers):
            worker.start(fill, itertools.islice(places, number, None, len(workers)))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()
