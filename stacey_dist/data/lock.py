"""A file lock, with which one process makes what many processes on a machine need.

It uses flock, not the filelock library: on a file system without flock, that library uses a marker file, which a killed
process leaves behind. Unlike lockf, which locks a run's directory, flock also excludes other threads of the process.
"""

import contextlib
import errno
import fcntl
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from stacey_dist.errors import InputError

_pause = functools.partial(time.sleep, 0.2)


@contextlib.contextmanager
def locked_directory(
    directory: Path, argument: str, when_full: str, wait: Callable[[], object] = _pause
) -> Iterator[None]:
    """Hold the lock of a directory to be filled, which is made where it is not there.

    Args:
        directory: what many processes ask for.
        argument: the name of the argument that gave the directory, for messages.
        when_full: what to do where its disk is full.
        wait: as for `locked`.

    Raises:
        InputError: it cannot be made or locked, or its disk is full.
    """
    make_directory(directory, argument)
    try:
        with locked(directory / "lock", wait):
            yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"{argument}: the disk of {directory} is full; {when_full}") from error


def make_directory(directory: Path, argument: str) -> None:
    """Make a directory where it is not there. Raises InputError if it cannot be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{argument}: {directory} cannot be made: {error.strerror}") from error


@contextlib.contextmanager
def locked(path: Path, wait: Callable[[], object] | None = _pause) -> Iterator[None]:
    """Hold a lock file, which the system gives back when the process ends, however it ends.

    Before it waits for another process, it says so on stderr.

    Args:
        path: the lock file, made where it is not there; its directory is named in the message. In a
            directory that can only be read, it is shared with others that only read.
        wait: is called again and again while another process holds it; it takes some time, and may raise an error.
            None: do not wait.

    Raises:
        BlockingIOError: another process holds it, and this one is not to wait.
        InputError: the file system has no such locks.
    """
    with _open(path) as file:
        # In a directory where this user writes nothing, as another user's cache, it waits for those who write.
        only_reads = not file.writable() and not os.access(path.parent, os.W_OK)
        kind = fcntl.LOCK_SH if only_reads else fcntl.LOCK_EX
        announced = False
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if wait is None:
                    raise
            except OSError as error:
                raise InputError(
                    f"{path.parent}: its file system has no flock ({error.strerror}; Lustre: mount with -o flock); "
                    "name a directory on another"
                ) from error
            if not announced:
                print(f"waiting for another process that is at work in {path.parent}", file=sys.stderr)
                announced = True
            wait()
        yield


def _open(path: Path) -> IO[bytes]:
    try:
        return open(path, "ab")
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS) or not path.exists():
            raise
        return open(path, "rb")
