"""The layout of ImageNet: a folder a split, in it a folder a class, in it image files."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from stacey_dist.data.images.image_set import identity_of, sampled
from stacey_dist.errors import SettingsError

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
VALIDATION_FOLDERS = ("val", "validation", "test")
# Network file systems answer one question after another slowly and many at once well.
_THREADS = 16


class FolderImages:
    """One split: ``<folder>/<class>/<image>``, classes in the order given, files in the order of their names.

    Files have one of IMAGE_SUFFIXES, in any case; others, and hidden ones, are left out.

    Args:
        folder: the split's folder.
        classes: the names of its class folders, sorted; all of them must be there and no others.

    Raises:
        SettingsError: a class folder is missing, unknown, without images, or cannot be read.
    """

    def __init__(self, folder: Path, classes: list[str]) -> None:
        found = class_folders(folder)
        for name in sorted(set(classes) - set(found)):
            raise SettingsError(f"data.path: {folder} has no folder for class {name!r}")
        for name in sorted(set(found) - set(classes)):
            raise SettingsError(f"data.path: {folder} has a folder {name!r}, which is none of the training classes")
        with ThreadPoolExecutor(_THREADS) as pool:
            listings = list(pool.map(lambda name: _images(folder / name), classes))
        for name, (files, _) in zip(classes, listings, strict=True):
            if not files:
                raise SettingsError(
                    f"data.path: {folder / name} has no images; their names end in {', '.join(IMAGE_SUFFIXES)}"
                )
        self.folder = folder
        self.classes = classes
        self.labels = np.repeat(np.arange(len(classes)), [len(files) for files, _ in listings])
        # Arrays of bytes: a million Python strings would be copied by every forked worker that looks at them.
        self._names = np.concatenate([np.array(files, dtype=np.bytes_) for files, _ in listings])
        self._sizes = np.concatenate([np.array(sizes, dtype=np.int64) for _, sizes in listings])

    @cached_property
    def identity(self) -> str:
        """A hash of class names, file names and sizes, and the content of up to 256 files, evenly spread."""
        contents = (self.read(i) for i in sampled(len(self)))
        return identity_of(self.classes, self.labels, [self._names, self._sizes, *contents])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> bytes:
        """Return the content of file i. Raises OSError where it cannot be read."""
        with open(self.name(i), "rb") as file:
            return file.read()

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
    classes = class_folders(path / "train")
    if not classes:
        raise SettingsError(f"data.path: {path / 'train'} has no class folders, which hold the images")
    return FolderImages(path / "train", classes), FolderImages(validation, classes)


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a split's folder, sorted, without hidden ones.

    Raises:
        SettingsError: it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise SettingsError(f"data.path: {folder} cannot be read: {error.strerror}") from error


def _images(folder: Path) -> tuple[list[bytes], list[int]]:
    """Return the names and sizes of a class's images, sorted by name."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith("."):
                    found.append((os.fsencode(entry.name), entry.stat().st_size))
    except OSError as error:
        raise SettingsError(f"data.path: {error.filename or folder} cannot be read: {error.strerror}") from error
    found.sort()
    return [name for name, _ in found], [size for _, size in found]
