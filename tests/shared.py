"""What costs much and serves many tests is made once for all of pytest's processes."""

import fcntl
import hashlib
import os
import pickle
import shutil
from pathlib import Path


def made_once(make, *arguments):
    """Return what make(directory, *arguments) returns: one of pytest's processes calls it, the others read the result.

    No test may change the directory, which outlives the test, or rely on its name. The result must be picklable.
    """
    called = f"{make.__module__}.{make.__qualname__}"
    name = f"{make.__name__}-{hashlib.sha256(repr((called, arguments)).encode()).hexdigest()[:8]}"
    directory = Path(os.environ["SHARED_BY_WORKERS"]) / name
    result = directory.with_suffix(".pickle")
    with open(directory.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            shutil.rmtree(directory, ignore_errors=True)  # of a call that failed
            directory.mkdir()
            result.write_bytes(pickle.dumps(make(directory, *arguments)))
    return pickle.loads(result.read_bytes())
