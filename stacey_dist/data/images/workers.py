"""The processes that prepare batches: how they are started, waited for and ended, whatever becomes of them."""

import atexit
import ctypes
import errno
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import util
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from stacey_dist.errors import SettingsError, StoppedWaitingError

T = TypeVar("T")

SHARED_MEMORY = Path("/dev/shm")
_POLL_SECONDS = 0.5
_STOP_SECONDS = 10.0
"""So long a batch is waited for after a request to stop: schedulers kill 30 seconds after theirs."""


class Workers:
    """A loader's batches, from worker processes that run ahead, or made when they are asked for.

    Args:
        dataset: gives a batch for a place.
        places: of the batches, in order; gone through anew at every `start`.
        workers: how many processes; 0 for none.
        prefetch: batches that each prepares ahead.
        pin_memory: put batches into page-locked memory.
        timeout: seconds after which a batch that does not come is an error.
        stopping: whether this process was told to stop.

    Raises:
        SettingsError: workers, prefetch or timeout is out of range.
    """

    def __init__(
        self,
        dataset: Dataset,
        places: Any,
        *,
        workers: int,
        prefetch: int,
        pin_memory: bool,
        timeout: float,
        stopping: Callable[[], bool],
    ) -> None:
        if workers < 0:
            raise SettingsError(f"data.workers must be at least 0, got {workers}")
        if prefetch < 1:
            raise SettingsError(f"data.prefetch must be at least 1, got {prefetch}")
        if not timeout > 0:
            raise SettingsError(f"data.timeout_seconds must be above 0, got {timeout}")
        self._count, self._timeout, self._stopping = workers, timeout, stopping
        self._loader: Any = DataLoader(
            dataset,
            sampler=places,
            batch_size=None,  # a place is a whole batch
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=_begin_worker,
            # Not a fork server, Python's default from 3.14 on: it ends by the SIGTERM that a scheduler sends to
            # everyone, and the workers with it. They share the index of the images, too.
            multiprocessing_context="fork" if workers else None,
            # Its own: workers' seeds would be drawn from the training process's generator.
            generator=torch.Generator(),
        )
        self._batches: Any = None
        self._end: Callable[[], None] | None = None

    @property
    def processes(self) -> list[Any]:
        """The worker processes that were started and not ended."""
        return list(getattr(self._batches, "_workers", []))

    def start(self) -> None:
        """Go through the places from the beginning, with the same worker processes if there are any.

        Raises as `next` does.
        """
        if self._count and self._batches is not None:
            # The workers answer that they begin anew, each after the batch that it is at.
            self._batches = self._wait(lambda: iter(self._loader))
        else:
            self._batches = _begin(self._loader)
        if self._end is None:
            self._end = _ending(self._batches, self)

    def next(self) -> Any:
        """Return the next batch; None after the last.

        Raises:
            SettingsError: a worker process died, or no batch came in time.
            StoppedWaitingError: the process was told to stop, and no batch came for ten seconds.
        """
        if not self._count:
            return next(self._batches, None)
        return self._wait(lambda: next(self._batches, None))

    def close(self) -> None:
        """End the worker processes. `start` starts others."""
        self._batches = None
        self._loader._iterator = None
        if self._end is not None:
            self._end()
            self._end = None

    def _wait(self, work: Callable[[], T]) -> T:
        """Return ``work()``, done in a thread, so that this one can look after everything else that may happen.

        A worker that is stopped, or killed in the middle of an answer, would be waited for in the system, which no
        signal ends.
        """
        outcome: dict[str, Any] = {}
        thread = threading.Thread(target=_record, args=(work, outcome), name="wait for a batch", daemon=True)
        thread.start()
        begun, told_to_stop = time.monotonic(), None
        while True:
            thread.join(_POLL_SECONDS)
            if not thread.is_alive() and "result" in outcome:
                return outcome["result"]
            self._check_processes()
            if not thread.is_alive():
                _raise(outcome["error"])
            now = time.monotonic()
            if now - begun > self._timeout:
                raise SettingsError(
                    f"data.timeout_seconds: no batch came from the worker processes within {self._timeout:g} s; a disk "
                    "that does not answer, or larger images than the limit allows for"
                )
            if told_to_stop is None and self._stopping():
                told_to_stop = now
            if told_to_stop is not None and now - told_to_stop > _STOP_SECONDS:
                raise StoppedWaitingError("data: told to stop, and no batch came from the worker processes")

    def _check_processes(self) -> None:
        """Raise SettingsError where a worker process has ended."""
        for process in self.processes:
            code = process.exitcode
            if code is not None and code < 0:
                raise SettingsError(
                    f"data.workers: worker process {process.pid} was killed by {signal.Signals(-code).name}; where the "
                    "system did so for lack of memory, lower data.workers, data.prefetch or train.micro_batch_size"
                )
            if code is not None:
                raise SettingsError(f"data.workers: worker process {process.pid} ended with status {code}")


def check_shared_memory(workers: int, prefetch: int, batch_bytes: int, processes: int) -> None:
    """Raise SettingsError where the batches that wait for training will not fit into shared memory.

    Args:
        workers: of each training process.
        prefetch: batches that each worker is ahead.
        batch_bytes: of a batch.
        processes: training processes on this machine.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return
    # Twice: the training batches stay prepared during an evaluation.
    needed = 2 * processes * workers * prefetch * batch_bytes
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise SettingsError(
            f"data.workers: {workers} worker processes{f' of {processes} processes each' if processes > 1 else ''}, "
            f"{prefetch} batches ahead (data.prefetch) of {batch_bytes / 1e6:.1f} MB, need {needed / 1e6:,.1f} MB of "
            f"{SHARED_MEMORY}, where {free / 1e6:,.1f} MB are free; {MORE_SHARED_MEMORY}"
        )


MORE_SHARED_MEMORY = (
    "give the container more (docker run --shm-size), lower data.prefetch or data.workers, or set data.workers: 0"
)


def _begin(loader: Any) -> Any:
    """Return an iterator over a loader, whose workers no signal meets before they ignore it."""
    # Workers inherit what is blocked; what comes meanwhile reaches this process afterwards.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # Torch's raises wherever this process is when a worker dies; here that is seen at the next wait for a batch.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGCHLD) is not handler:
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def _ending(batches: Any, owner: object) -> Callable[[], None]:
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
    if not hasattr(batches, "_shutdown_workers"):
        return
    if hasattr(batches, "_pin_memory_thread"):
        # First, for it may be receiving a batch; not for long, for it may wait for a worker that hangs.
        batches._pin_memory_thread_done_event.set()
        batches._worker_result_queue.put((None, None))
        batches._pin_memory_thread.join(5)
    # Workers only read. Torch would give each that hangs ten seconds, one after the other, and then leave it.
    for worker in batches._workers:
        worker.kill()
    batches._shutdown_workers()


def _as_it_is(answer: Any) -> Any:
    return answer


def _begin_worker(_worker: int) -> None:
    """Let the training process finish its step and save: a scheduler, or Ctrl-C, signals all processes at once.

    A worker ends when it is told to, and with its parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        # Killed when the thread that started it ends, however that ends. Elsewhere, and where the parent has ended
        # already, torch's loop in the worker looks for it every five seconds.
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


def _record(work: Callable[[], Any], outcome: dict[str, Any]) -> None:
    try:
        outcome["result"] = work()
    except BaseException as error:  # every error goes to the thread that waits, which raises it
        outcome["error"] = error


def _raise(error: BaseException) -> None:
    if getattr(error, "errno", None) == errno.EMFILE or str(error).startswith("Too many open files"):
        raise SettingsError(
            "data.workers: this process has too many open files to receive a batch; raise the limit (ulimit -n), or "
            "lower data.prefetch or data.workers"
        ) from error
    raise error
