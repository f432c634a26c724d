"""A file lock, with which one process makes what many processes on a machine need.

It uses flock, not the filelock library: on a file system without flock, that library uses a marker file, which a killed
process leaves behind. Unlike lockf, which locks a run's directory, flock also excludes other threads of the process.
"""

import contextlib
import errno
import fcntl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from stacey_dist.errors import InputError


@contextlib.contextmanager
def locked_directory(
    directory: Path, argument: str, when_full: str, *, announce: bool, meanwhile: Callable[[], object] | None = None
) -> Iterator[None]:
    """Hold the lock of a directory to be filled, which is made where it is not there.

    Args:
        directory: what many processes ask for.
        argument: the name of the argument that gave the directory, for messages.
        when_full: what to do where its disk is full.
        announce: as for `locked`.
        meanwhile: as for `locked`.

    Raises:
        InputError: it cannot be made or locked, or its disk is full.
    """
    make_directory(directory, argument)
    try:
        with locked(directory / "lock", announce, meanwhile=meanwhile):
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
def locked(
    path: Path, announce: bool, *, wait: bool = True, meanwhile: Callable[[], object] | None = None
) -> Iterator[None]:
    """Hold a lock file, which the system gives back when the process ends, however it ends.

    Args:
        path: the lock file, made where it is not there; its directory is named in the message.
        announce: say on stderr when another process holds it and this one waits.
        wait: wait for it.
        meanwhile: is called again and again while it waits; it takes some time, and may raise an error.

    Raises:
        BlockingIOError: another process holds it, and this one is not to wait.
        InputError: the file system has no such locks.
    """
    with open(path, "ab") as file:
        try:
            _flock(file, path, fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            if announce:
                print(f"waiting for another process that is at work in {path.parent}", file=sys.stderr)
            if meanwhile is None:
                _flock(file, path)
            while meanwhile is not None:
                meanwhile()
                with contextlib.suppress(BlockingIOError):
                    _flock(file, path, fcntl.LOCK_NB)
                    break
        yield


def _flock(file: IO[bytes], path: Path, how: int = 0) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | how)
    except BlockingIOError:
        raise
    except OSError as error:
        raise InputError(
            f"{path.parent}: its file system has no flock ({error.strerror}; Lustre: mount with -o flock); "
            "name a directory on another"
        ) from error
