"""The layout of ImageNet: a folder a split, in it a folder a class, in it image files.

The ``imagefolder`` of ``datasets`` reads it too, and takes 37 seconds at each start for 30 000 images; this takes 0.3.
"""

import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from stacey_dist.data.images.image_set import identity_of, read_file, read_sampled
from stacey_dist.errors import InputError

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
        InputError: a class folder is missing, unknown, without images, or cannot be read.
    """

    def __init__(self, folder: Path, classes: list[str]) -> None:
        found, left_out = class_folders(folder)
        for name in sorted(set(classes) - set(found)):
            raise InputError(f"path: {folder} has no folder for class {name!r}")
        for name in sorted(set(found) - set(classes)):
            raise InputError(f"path: {folder} has a folder {name!r}, which is none of the training classes")
        with ThreadPoolExecutor(_THREADS) as pool:
            listings = list(pool.map(lambda name: _images(folder / name), classes))
        for name, (files, others) in zip(classes, listings, strict=True):
            left_out += [f"{name}/{other}" for other in others]
            if not files:
                raise InputError(
                    f"path: {folder / name} has no images; they are files whose names end in "
                    f"{', '.join(IMAGE_SUFFIXES)}"
                )
        if left_out:
            more = f" and {len(left_out) - 1:,} more" if len(left_out) > 1 else ""
            print(f"data: {folder}: left out {left_out[0]!r}{more}: no class folder, or no image file", file=sys.stderr)
        self.folder = folder
        self.classes = classes
        self.labels = np.repeat(np.arange(len(classes)), [len(files) for files, _ in listings])
        # Arrays of bytes: a million Python strings would be copied by every forked worker that looks at them.
        self._names = np.concatenate([np.array([name for name, _ in files], np.bytes_) for files, _ in listings])
        self._sizes = np.array([size for files, _ in listings for _, size in files], np.int64)

    @cached_property
    def identity(self) -> str:
        """A hash of class names, file names and sizes, and the content of up to 256 files, evenly spread."""
        return identity_of(self, [self._names, self._sizes, *read_sampled(self)])

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
        InputError: there are no classes, or the two do not have the same, or a class has no images.
    """
    validation = next((path / name for name in VALIDATION_FOLDERS if (path / name).is_dir()), None)
    if validation is None:
        raise InputError(f"path: {path} has train and none of {', '.join(VALIDATION_FOLDERS)} beside it")
    classes, _ = class_folders(path / "train")
    if not classes:
        raise InputError(f"path: {path / 'train'} has no class folders, which hold the images")
    return FolderImages(path / "train", classes), FolderImages(validation, classes)


def class_folders(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the class folders in a split's folder, and of all else that lies there, both sorted.

    Raises:
        InputError: it cannot be read.
    """
    classes: list[str] = []
    others: list[str] = []
    for entry in _entries(folder):
        usable = entry.is_dir() and not entry.name.startswith(".") and entry.name not in NO_CLASSES
        (classes if usable else others).append(entry.name)
    return sorted(classes), sorted(others)


def _images(folder: Path) -> tuple[list[tuple[bytes, int]], list[str]]:
    """Return the names and sizes of a class's images, and the names of what is none, both sorted."""
    found, others = [], []
    for entry in _entries(folder):
        named_so = entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith(".")
        try:
            # Only where it is named so: the status of a file is a question to the disk.
            status = entry.stat() if named_so else None
        except OSError as error:
            raise InputError(f"path: {error.filename} cannot be read: {error.strerror}") from error
        if status is not None and stat.S_ISREG(status.st_mode):
            found.append((os.fsencode(entry.name), status.st_size))
        else:
            others.append(entry.name)
    return sorted(found), sorted(others)


def _entries(folder: Path) -> "list[os.DirEntry[str]]":
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise InputError(f"path: {folder} cannot be read: {error.strerror}") from error
