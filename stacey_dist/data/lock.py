"""One process at a time makes what many processes on a machine ask for."""

import contextlib
import fcntl
import sys
from collections.abc import Iterator
from pathlib import Path

from stacey_dist.errors import SettingsError


@contextlib.contextmanager
def locked(path: Path, announce: bool) -> Iterator[None]:
    """Hold a lock file that the system gives back when the process ends, however it ends.

    Args:
        path: the lock file, made where it is not there; its directory is named in the message.
        announce: say on stderr when another process holds it and this one waits.
    """
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if announce:
                print(f"waiting for another process that is at work in {path.parent}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise SettingsError(
                f"{path.parent}: its file system has no flock ({error.strerror}; Lustre: mount with -o flock); name a "
                "directory on another, as in data.cache_dir"
            ) from error
        yield
