"""Remove the locks that killed processes left in `torch.utils.cpp_extension`, which compiles DeepSpeed's extensions.

torch's `FileBaton` makes an empty file and removes it when the build ends. If the process is killed during the build,
the file stays, and every later process waits for it forever, without a message. (Inductor uses locks of the operating
system, which end with their process; Triton has none.) The file does not name its owner, but the owner keeps it open.
"""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from stacey_dist.errors import SettingsError

# File systems on which only processes of this machine can open a file; others may be shared by machines.
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs", "ramfs", "apfs"}
_LONGEST_BUILD_SECONDS = 1800.0
_JUST_MADE_SECONDS = 2.0
_SAY_AFTER_SECONDS = 10.0
_LOOK_EVERY_SECONDS = 2.0


def watch() -> None:
    """Remove the locks that killed processes left, and make torch's later waits for a lock watch its owner.

    Each process calls it before it may compile.
    """
    root = Path(cpp_extension._get_build_directory("", verbose=False))
    for path in root.glob("*/lock"):
        if _remove_if_left(path):
            print(f"{path}: removed, for the process that compiled there has ended", file=sys.stderr, flush=True)
    FileBaton.wait = _wait  # type: ignore[method-assign, assignment]


def _wait(baton: FileBaton) -> None:
    """Wait as `FileBaton.wait` does, but say so, and raise SettingsError when nobody is left to wait for."""
    path, since, said = Path(baton.lock_file_path), time.monotonic(), False
    look_at = since + _LOOK_EVERY_SECONDS
    while path.exists():
        time.sleep(baton.wait_seconds)
        now = time.monotonic()
        if not said and now - since > _SAY_AFTER_SECONDS:
            said = True
            owner = next((f"process {number}" for number in _openers(path)), "a process that cannot be seen from here")
            print(f"waiting for {path}: {owner} compiles there", file=sys.stderr, flush=True)
        if now > look_at:
            look_at = now + _LOOK_EVERY_SECONDS
            if _remove_if_left(path):
                raise SettingsError(
                    f"{path}: the process that compiled there ended before it was done; start the same command again"
                )


def _remove_if_left(path: Path) -> bool:
    """Remove a lock whose owner is gone; return whether this process did. One process at a time looks and removes."""
    try:
        with open(path.with_name("lock.check"), "a") as guard:
            with contextlib.suppress(OSError):  # a file system without flock
                fcntl.flock(guard, fcntl.LOCK_EX)
            if not _is_left(path):
                return False
            path.unlink()
            return True
    except OSError:  # it is gone, or another user's
        return False


def _is_left(path: Path) -> bool:
    """Return whether a lock's owner is gone: on a local file system nobody has it open; elsewhere it is very old."""
    age = time.time() - path.stat().st_mtime
    if age < _JUST_MADE_SECONDS or any(True for _ in _openers(path)):
        return False
    return _file_system(path) in _LOCAL or age > _LONGEST_BUILD_SECONDS


def _openers(path: Path) -> Iterator[int]:
    """Yield the processes of this machine that have a file open, as far as this user may see them."""
    wanted = path.stat()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.path.samestat(descriptor.stat(), wanted):
                yield int(descriptor.parts[2])


def _file_system(path: Path) -> str:
    """Return the type of the file system that a file is on; empty where the system does not say."""
    place, best, kind = str(path.resolve()), "", ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            point = before.split()[4].replace("\\040", " ")
            inside = place == point or place.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):
                best, kind = point, after.split()[0]
    return kind
