"""The layout of ImageNet: a folder a split, in it a folder a class, in it image files.

The ``imagefolder`` of ``datasets`` reads it too, and takes 37 seconds at each start for 30 000 images; this takes 0.3.
"""

import os
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stacey_dist.data.images.image_set import identity_of, read_file, read_sampled
from stacey_dist.data.images.listing import IMAGE_SUFFIXES, entries, list_images, map_rows
from stacey_dist.errors import InputError

VALIDATION_FOLDERS = ("val", "validation", "test")
NO_CLASSES = (
    "@eaDir", "@tmp", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "__MACOSX", "__pycache__",
    "$RECYCLE.BIN", "System Volume Information", "lost+found",
)  # fmt: skip
"""Folders that storage systems, archives and programs leave among others; hidden ones are left out too."""


class FolderImages:
    """One split: ``<folder>/<class>/<image>``, classes in the order given, files in the order of their names.

    Args:
        folder: the split's folder.
        classes: the names of its class folders.
        counts: how many images each class has.
        rows: their names and sizes, as `Listing` has them, or the file from which they are mapped by every process that
            gets a pickled copy.
    """

    def __init__(self, folder: Path, classes: list[str], counts: list[int], rows: "Path | NDArray[np.void]") -> None:
        self.folder, self.classes = folder, classes
        self.labels = np.repeat(np.arange(len(classes)), counts)
        self._rows = map_rows(rows) if isinstance(rows, Path) else rows
        self._pickled = folder, classes, counts, rows

    def __reduce__(self) -> tuple[Any, ...]:
        return FolderImages, self._pickled

    @cached_property
    def identity(self) -> str:
        """A hash of class names, file names and sizes, and the content of up to 256 files, evenly spread."""
        return identity_of(self, [self._rows["name"], self._rows["size"], *read_sampled(self)])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> bytes:
        """Return the content of file i. Raises as `read_file` does."""
        return read_file(self.name(i))

    def name(self, i: int) -> str:
        """Return the path of file i."""
        return os.path.join(self.folder, self.classes[self.labels[i]], os.fsdecode(bytes(self._rows["name"][i])))


def folder_images(path: Path, cache: Path | None = None) -> tuple[FolderImages, FolderImages]:
    """Return (train, validation) of a directory with ``train`` and ``val``, ``validation`` or ``test``.

    The classes are the folders in ``train``, sorted by name. Images are regular files, or links to such, whose names
    have one of IMAGE_SUFFIXES, in any case. All else is left out, as are folders that are no classes (hidden ones, and
    NO_CLASSES), and one line on stderr for each split says so.

    Args:
        path: the directory.
        cache: a directory in which the names are remembered; None to keep them in memory.

    Raises:
        InputError: there are no classes, or the two do not have the same, a class has no images, or a folder cannot be
            read.
    """
    validation = next((path / name for name in VALIDATION_FOLDERS if (path / name).is_dir()), None)
    if validation is None:
        raise InputError(f"path: {path} has train and none of {', '.join(VALIDATION_FOLDERS)} beside it")
    classes, _ = _class_folders(path / "train")
    if not classes:
        raise InputError(f"path: {path / 'train'} has no class folders, which hold the images")
    return _split(path / "train", classes, cache), _split(validation, classes, cache)


def _split(folder: Path, classes: list[str], cache: Path | None) -> FolderImages:
    found, left_out = _class_folders(folder)
    for name in sorted(set(classes) - set(found)):
        raise InputError(f"path: {folder} has no folder for class {name!r}")
    for name in sorted(set(found) - set(classes)):
        raise InputError(f"path: {folder} has a folder {name!r}, which is none of the training classes")
    listing = list_images(folder, classes, cache)
    for name, count, others in zip(classes, listing.counts, listing.others, strict=True):
        left_out += [f"{name}/{other}" for other in others]
        if not count:
            raise InputError(
                f"path: {folder / name} has no images; they are files whose names end in {', '.join(IMAGE_SUFFIXES)}"
            )
    if left_out:
        more = f" and {len(left_out) - 1:,} more" if len(left_out) > 1 else ""
        print(f"data: {folder}: left out {left_out[0]!r}{more}: no class folder, or no image file", file=sys.stderr)
    return FolderImages(folder, classes, listing.counts, listing.rows)


def _class_folders(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the class folders in a split's folder, and of all else that lies there, both sorted.

    Raises:
        InputError: it cannot be read.
    """
    classes: list[str] = []
    others: list[str] = []
    for entry in entries(folder):
        usable = entry.is_dir() and not entry.name.startswith(".") and entry.name not in NO_CLASSES
        (classes if usable else others).append(entry.name)
    return sorted(classes), sorted(others)
