"""What costs much and serves many tests is made once for all of pytest's processes."""

import contextlib
import fcntl
import hashlib
import os
import pickle
import traceback
from pathlib import Path

from stacey_dist.files import replace_file


@contextlib.contextmanager
def locked(name):
    """Hold the lock of a name in pytest's processes' shared directory; the context value is a path there."""
    path = Path(os.environ["SHARED_BY_WORKERS"]) / name
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def made_once(make, *arguments):
    """Return what make(directory, *arguments) returns: one of pytest's processes calls it, the others read the result.

    No test may change the directory, which outlives the test, or rely on its name. The result must be picklable. Where
    it raises, all raise, and it is not called again.
    """
    called = f"{make.__module__}.{make.__qualname__}"
    name = f"{make.__name__}-{hashlib.sha256(repr((called, arguments)).encode()).hexdigest()[:8]}"
    with locked(name) as directory:
        result, failure = directory.with_suffix(".pickle"), directory.with_suffix(".failed")
        if failure.exists():
            raise AssertionError(f"{name} failed in another of pytest's processes, or before:\n{failure.read_text()}")
        if not result.exists():
            directory.mkdir()
            try:
                made = pickle.dumps(make(directory, *arguments))
            except BaseException:
                failure.write_text(traceback.format_exc())
                raise
            replace_file(result, made)
    return pickle.loads(result.read_bytes())
