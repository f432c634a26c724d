"""The interface of a set of labelled images: images by number, labels, class names, an identity."""

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stacey_dist.data.images.decode import BrokenImageError, decode
from stacey_dist.errors import InputError
from stacey_dist.files import open_regular

_SAMPLED_IMAGES = 256
_LARGEST_FILE = 2**30


class ImageSet(Protocol):
    """Labelled images in a fixed order, any of which can be read at any time, by many processes at once.

    It can be pickled, for the other processes of a run, and keeps no Python object for each image: forked workers would
    copy those.
    """

    @property
    def classes(self) -> list[str]:
        """The names of the classes; a label is a place in this list."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """Every image's label, of length n."""
        ...

    @property
    def identity(self) -> str:
        """A hash that differs where the data differ, and is the same where they only lie elsewhere."""
        ...

    def __len__(self) -> int: ...

    def read(self, i: int) -> bytes | NDArray[np.uint8]:
        """Return image i: an encoded file, or RGB pixels of shape (height, width, 3).

        Raises:
            BrokenImageError: it is known that the image cannot be decoded.
            OSError: its file cannot be read.
        """
        ...

    def name(self, i: int) -> str:
        """Return how a person finds image i."""
        ...


class ArrayImages:
    """Images in memory.

    Args:
        pixels: uint8 of shape (n, height, width, 3), RGB.
        labels: n integers below the number of classes.
        classes: the classes' names.
        source: what ``name`` puts before an image's number.

    Raises:
        ValueError: shapes, dtypes or labels are other than these.
    """

    def __init__(
        self, pixels: NDArray[np.uint8], labels: NDArray[np.integer], classes: list[str], source: str = "image"
    ) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ValueError(f"pixels must be uint8 of shape (n, height, width, 3), got {pixels.dtype} {pixels.shape}")
        if labels.shape != pixels.shape[:1]:
            raise ValueError(f"{len(pixels)} images need as many labels, got shape {labels.shape}")
        if labels.size and not 0 <= labels.min() <= labels.max() < len(classes):
            raise ValueError(f"labels must be from 0 to {len(classes) - 1}, got {labels.min()} to {labels.max()}")
        self.pixels = pixels
        self.labels = labels.astype(np.int64)
        self.classes = classes
        self.source = source

    @cached_property
    def identity(self) -> str:
        """A hash of all pixels, labels and class names."""
        return identity_of(self, [self.pixels])

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Return the pixels of image i."""
        return self.pixels[i]

    def name(self, i: int) -> str:
        """Return the source and the number."""
        return f"{self.source} {i}"


def read_pixels(images: ImageSet, i: int) -> NDArray[np.uint8]:
    """Return image i of a set as RGB pixels of shape (height, width, 3).

    Raises:
        BrokenImageError: it cannot be decoded.
        InputError: its file cannot be read.
    """
    try:
        content = images.read(i)
    except OSError as error:
        raise InputError(f"{images.name(i)} can no longer be read: {error}") from error
    return decode(content) if isinstance(content, bytes) else content


def read_file(path: str) -> bytes:
    """Return the content of an image file.

    Raises:
        BrokenImageError: it is larger than 1 GiB, ten times as large as large photos are, or no regular file: a folder,
            a pipe, a device.
        OSError: it cannot be read.
    """
    try:
        with open_regular(Path(path)) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _LARGEST_FILE:
                raise BrokenImageError(f"{size:,} bytes are too many for an image")
            return file.read(size)  # a larger number would take that much memory first
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENXIO):
            raise BrokenImageError("no regular file") from error
        raise


def sampled(count: int) -> list[int]:
    """Return up to 256 of ``count`` images, evenly spread: as many as are looked into where all would take long."""
    return np.unique(np.linspace(0, count - 1, min(count, _SAMPLED_IMAGES)).astype(np.int64)).tolist()


def read_sampled(images: ImageSet) -> Iterator[bytes | NDArray[np.uint8]]:
    """Yield the `sampled` images of a set, nothing in the place of a broken one.

    Raises:
        InputError: the file of one cannot be read.
    """
    for i in sampled(len(images)):
        try:
            yield images.read(i)
        except BrokenImageError:
            yield b""
        except OSError as error:
            raise InputError(f"{images.name(i)} cannot be read: {error}") from error


def identity_of(images: ImageSet, contents: Iterable[bytes | NDArray]) -> str:
    """Return a hash of a set's class names and labels, and of any contents in their order."""
    result = hashlib.sha256()
    for content in ("\0".join(images.classes).encode("utf-8", "surrogatepass"), images.labels, *contents):
        if isinstance(content, bytes):
            result.update(f"bytes {len(content)}:".encode())
            result.update(content)
        else:
            result.update(f"{content.dtype.str} {content.shape}:".encode())
            result.update(np.ascontiguousarray(content).data)
    return result.hexdigest()
