"""The layout of ImageNet: a folder a split, in it a folder a class, in it image files."""

import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from stacey_dist.data.images.files import read_file, read_or_empty
from stacey_dist.data.images.image_set import identity_of, sampled
from stacey_dist.errors import SettingsError

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
VALIDATION_FOLDERS = ("val", "validation", "test")
NO_CLASSES = (
    "@eaDir", "@tmp", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "__MACOSX", "__pycache__",
    "$RECYCLE.BIN", "System Volume Information", "lost+found",
)  # fmt: skip
"""Folders that storage systems, archives and programs leave among others; hidden ones are left out too."""

# Network file systems answer one question after another slowly and many at once well.
_THREADS = 16


class FolderImages:
    """One split: ``<folder>/<class>/<image>``, classes in the order given, files in the order of their names.

    Images are regular files, or links to such, whose names have one of IMAGE_SUFFIXES, in any case. All else is left
    out, as are folders that are no classes (hidden ones, and NO_CLASSES), and one line on stderr says so.

    Args:
        folder: the split's folder.
        classes: the names of its class folders, sorted; all of them must be there and no others.

    Raises:
        SettingsError: a class folder is missing, unknown, without images, or cannot be read.
    """

    def __init__(self, folder: Path, classes: list[str]) -> None:
        found, passed_over = class_folders(folder)
        for name in sorted(set(classes) - set(found)):
            raise SettingsError(f"data.path: {folder} has no folder for class {name!r}")
        for name in sorted(set(found) - set(classes)):
            raise SettingsError(f"data.path: {folder} has a folder {name!r}, which is none of the training classes")
        with ThreadPoolExecutor(_THREADS) as pool:
            listings = list(pool.map(lambda name: _images(folder / name), classes))
        for name, listing in zip(classes, listings, strict=True):
            passed_over += [f"{name}/{entry}" for entry in listing.passed_over]
            if not listing.names:
                raise SettingsError(
                    f"data.path: {folder / name} has no images; they are files whose names end in "
                    f"{', '.join(IMAGE_SUFFIXES)}"
                )
        _say_what_is_left_out(folder, passed_over)
        self.folder = folder
        self.classes = classes
        self.labels = np.repeat(np.arange(len(classes)), [len(listing.names) for listing in listings])
        # Arrays of bytes: a million Python strings would be copied by every forked worker that looks at them.
        self._names = np.concatenate([np.array(listing.names, dtype=np.bytes_) for listing in listings])
        self._sizes = np.concatenate([np.array(listing.sizes, dtype=np.int64) for listing in listings])

    @cached_property
    def identity(self) -> str:
        """A hash of class names, file names and sizes, and the content of up to 256 files, evenly spread."""
        contents = (read_or_empty(self.name(i)) for i in sampled(len(self)))
        return identity_of(self.classes, self.labels, [self._names, self._sizes, *contents])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> bytes:
        """Return the content of file i. Raises as `read_file` does."""
        return read_file(self.name(i))

    def name(self, i: int) -> str:
        """Return the path of file i."""
        return os.path.join(self.folder, self.classes[self.labels[i]], os.fsdecode(bytes(self._names[i])))


def folder_images(path: Path) -> tuple[FolderImages, FolderImages]:
    """Return (train, validation) of a directory with ``train`` and ``val``, ``validation`` or ``test``.

    The classes are the folders in ``train``, sorted by name.

    Raises:
        SettingsError: there are no classes, or the two do not have the same, or a class has no images.
    """
    validation = next((path / name for name in VALIDATION_FOLDERS if (path / name).is_dir()), None)
    if validation is None:
        raise SettingsError(f"data.path: {path} has train and none of {', '.join(VALIDATION_FOLDERS)} beside it")
    classes, _ = class_folders(path / "train")
    if not classes:
        raise SettingsError(f"data.path: {path / 'train'} has no class folders, which hold the images")
    return FolderImages(path / "train", classes), FolderImages(validation, classes)


def class_folders(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the class folders in a split's folder, and of all else that lies there, both sorted.

    Raises:
        SettingsError: it cannot be read.
    """
    classes: list[str] = []
    others: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                usable = entry.is_dir() and not entry.name.startswith(".") and entry.name not in NO_CLASSES
                (classes if usable else others).append(entry.name)
    except OSError as error:
        raise SettingsError(f"data.path: {folder} cannot be read: {error.strerror}") from error
    return sorted(classes), sorted(others)


@dataclass(frozen=True)
class _Listing:
    """A class's images, sorted by name, with their sizes, and the names of what is none."""

    names: list[bytes]
    sizes: list[int]
    passed_over: list[str]


def _images(folder: Path) -> _Listing:
    found, others = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                named_so = entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith(".")
                # Only then: the status of a file is a question to the disk.
                if named_so and stat.S_ISREG((status := entry.stat()).st_mode):
                    found.append((os.fsencode(entry.name), status.st_size))
                else:
                    others.append(entry.name)
    except OSError as error:
        raise SettingsError(f"data.path: {error.filename or folder} cannot be read: {error.strerror}") from error
    found.sort()
    return _Listing([name for name, _ in found], [size for _, size in found], sorted(others))


def _say_what_is_left_out(folder: Path, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        print(f"data: {folder}: left out {names[0]!r}{more}: no class folder, or no image file", file=sys.stderr)
