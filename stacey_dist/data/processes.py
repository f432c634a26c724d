"""Child processes that end when their parent ends."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterable
from multiprocessing import connection, get_context, parent_process
from typing import Any

from stacey_dist.errors import InputError

_SET_PARENT_DEATH_SIGNAL = 1

# Python 3.14 would use a fork server. A scheduler sends SIGTERM to all processes, which ends the fork server and its
# children. Forked processes also share this process's memory.
FORK = get_context("fork")


def end_with_parent() -> None:
    """Let the system kill this forked process when the thread that started it ends, however that ends."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    parent = parent_process()
    if parent is None or os.getppid() != parent.pid:
        os._exit(1)


class Helpers:
    """Forked processes, each of which reports to this one.

    Used as a context manager, which kills them at its end. So their files must be valid at any instant.

    Args:
        work: what each process does, given its number. It yields reports, which can be pickled.
        count: processes.
    """

    def __init__(self, work: Callable[[int], Iterable[Any]], count: int) -> None:
        self._work = work
        self._running: dict[connection.Connection, Any] = {}
        for number in range(count):
            reports, sender = FORK.Pipe(duplex=False)
            process = FORK.Process(target=self._run, args=(number, sender), daemon=True)
            process.start()
            sender.close()  # so that the pipe ends with the process
            self._running[reports] = process

    def __enter__(self) -> "Helpers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            process.kill()
            process.join()

    @property
    def running(self) -> bool:
        """Whether a process has not ended yet, as far as `reports` has seen."""
        return bool(self._running)

    def reports(self, timeout: float) -> list[Any]:
        """Return new reports, after waiting for one.

        Raises:
            InputError: a process was killed, or ended with an error.
            OSError: a process raised it.
        """
        found = []
        for pipe in connection.wait(list(self._running), timeout):
            assert isinstance(pipe, connection.Connection)
            try:
                report = pipe.recv()
            except (EOFError, ConnectionError):
                process = self._running.pop(pipe)
                process.join()
                if process.exitcode:
                    raise death(process, "`workers`") from None
                continue
            if isinstance(report, OSError):
                raise report
            found.append(report)
        return found

    def _run(self, number: int, sender: connection.Connection) -> None:
        end_with_parent()
        # A scheduler, or Ctrl-C, signals all processes at once. This one ignores signals: it ends with its parent.
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        with contextlib.suppress(BrokenPipeError):
            try:
                for report in self._work(number):
                    sender.send(report)
            except OSError as error:
                sender.send(error)


def death(process: Any, settings: str) -> InputError:
    """Return the error that says how a process ended, and the settings to lower where it lacked memory."""
    if process.exitcode < 0:
        return InputError(
            f"workers: worker process {process.pid} was killed by {signal.Signals(-process.exitcode).name}; where the "
            f"system did so for lack of memory, lower {settings}"
        )
    return InputError(f"workers: worker process {process.pid} ended with status {process.exitcode}")
