"""Image files, read so that whatever lies in their place cannot make training wait or fill the memory."""

import os
import stat

from stacey_dist.data.images.decode import BrokenImageError

MOST_BYTES = 2**30
"""Of an image file: the largest photos have a tenth of it."""


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return the content of an image file.

    Raises:
        BrokenImageError: it is too large for an image, or no regular file: a folder, a pipe, a device.
        OSError: it cannot be read.
    """
    with open(path, "rb", opener=_open_regular_file) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_BYTES:
            raise BrokenImageError(f"{size:,} bytes are too many for an image")
        return file.read(MOST_BYTES)


def read_or_empty(path: str | os.PathLike[str]) -> bytes:
    """Return the content of an image file, or nothing where it is broken. Raises OSError where it cannot be read."""
    try:
        return read_file(path)
    except BrokenImageError:
        return b""


def _open_regular_file(path: str, flags: int) -> int:
    # A pipe that nobody writes to would be waited for.
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BrokenImageError("no regular file")
    return descriptor
