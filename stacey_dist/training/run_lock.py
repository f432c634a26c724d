"""Allow one run at a time in a directory: two would delete each other's checkpoints and mix their metrics.

The filelock library is not suitable: on a file system without locks it uses a marker file, which a killed process
leaves behind, and the holder's name would need another file.
"""

import contextlib
import fcntl
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

from stacey_dist.errors import SettingsError

# A killed process may take a while to end. After a node is lost, NFS may take a while to release its locks.
_PATIENCE_HERE_SECONDS = 30.0
_PATIENCE_ELSEWHERE_SECONDS = 120.0


_held: "WeakValueDictionary[tuple[int, int], IO[str]]" = WeakValueDictionary()
"""The locks of this process, by device and inode."""


def acquire_run_lock(directory: Path) -> IO[str]:
    """Take `directory` for this process, until the returned file is closed or the process ends, however it ends.

    Called again, as in a notebook's cell, it returns the same file, because a process loses a POSIX lock when it closes
    any descriptor of the file. It waits for a while for another process that has the directory. If the file system has
    no locks, it prints that and takes none.

    Raises:
        SettingsError: another process has it, and keeps it.
        OSError: the directory cannot be written.
    """
    path = directory / ".lock"
    with contextlib.suppress(FileNotFoundError):
        held = _held.get((os.stat(path).st_dev, os.stat(path).st_ino))
        if held is not None and not held.closed:
            return held
    file = open(path, "a+")  # noqa: SIM115
    me = f"process {os.getpid()} on {socket.gethostname()}"
    deadline = None
    while True:
        try:
            # Not flock: processes that this one forks, as to read data, would hold it after its death.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):  # which of the two, POSIX leaves to the system
            file.seek(0)
            holder = file.read().strip() or "another process"
        except OSError as error:
            print(f"run_dir: {directory}: no lock can be taken there ({error.strerror}): see that no other run uses it")
            return file
        if deadline is None:
            here = holder.split(" on ")[-1] == socket.gethostname()
            deadline = time.monotonic() + (_PATIENCE_HERE_SECONDS if here else _PATIENCE_ELSEWHERE_SECONDS)
            print(f"run_dir: {holder} trains in {directory}; waiting for its end", file=sys.stderr, flush=True)
        if time.monotonic() > deadline:
            file.close()
            raise SettingsError(
                f"run_dir: {directory} is in use by {holder}; give another --run_dir, or delete {path} if that process "
                "has ended"
            )
        time.sleep(0.2)
    file.truncate(0)
    file.write(me + "\n")
    file.flush()
    status = os.fstat(file.fileno())
    _held[status.st_dev, status.st_ino] = file
    return file
