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
    # A pipe that nobody writes to would be waited for.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BrokenImageError("no regular file")
        if status.st_size > MOST_BYTES:
            raise BrokenImageError(f"{status.st_size:,} bytes are too many for an image")
        return file.read(MOST_BYTES)


def read_or_empty(path: str | os.PathLike[str]) -> bytes:
    """Return the content of an image file, or nothing where it is broken. Raises OSError where it cannot be read."""
    try:
        return read_file(path)
    except BrokenImageError:
        return b""
