"""The image files of class folders, remembered on a disk: later starts look at the folders alone.

A folder whose modification time is unchanged is not listed again. A file that is overwritten in place does not change
that time: it is noticed only if its content is part of the images' identity.
"""

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stacey_dist.data.lock import locked_directory
from stacey_dist.errors import InputError
from stacey_dist.files import read_json, replace_file, write_json

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

_FORMAT_VERSION = 1
_SETTLED_NS = 10 * 10**9
"""A folder that changed so shortly before it was listed may have changed again without another time."""

_KEPT_SECONDS = 90 * 24 * 3600
"""Rows are kept this long after the last start of a run that maps them: other hosts cannot read a removed file."""

# Network file systems answer one question after another slowly and many at once well.
_THREADS = 16


@dataclass(frozen=True)
class Listing:
    """The images of several folders.

    Attributes:
        rows: each file's ``name``, in bytes, and its ``size``, folder after folder, sorted by name; or the file from
            which `map_rows` maps them.
        counts: how many each folder has.
        others: what is no image in each folder, sorted.
    """

    rows: NDArray[np.void] | Path
    counts: list[int]
    others: list[list[str]]


def list_images(folder: Path, classes: Sequence[str], cache: Path | None) -> Listing:
    """Return the images in the folders of some classes.

    Args:
        folder: where the folders of the classes are.
        classes: their names.
        cache: the directory in which the result is remembered; None not to.

    Raises:
        InputError: a folder cannot be read.
    """
    if cache is None:
        return Listing(*_list(folder, classes, {}))
    directory = cache / "listings"
    remembered = directory / f"{hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:24]}.json"
    with locked_directory(directory, "cache_dir", "name a `cache_dir` on another"):
        begun, times = time.time_ns(), _times(folder, classes)
        old: dict[str, tuple[NDArray[np.void], list[str]]] = {}
        try:
            known = read_json(remembered)
            rows = map_rows(directory / known["file"]) if known["format"] == _FORMAT_VERSION else None
            end = 0
            for name, (changed, listed, count, others) in known["classes"].items():
                end += count
                if rows is not None and changed == times.get(name) and changed < listed - _SETTLED_NS:
                    old[name] = rows[end - count : end], others
        # There is none, or it is damaged.
        except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError):
            old, rows = {}, None
        if rows is not None and list(known["classes"]) == list(old) == list(classes):
            with contextlib.suppress(OSError):  # of another user's cache, perhaps
                os.utime(directory / known["file"])  # a run begins that maps it
            counts = [len(old[name][0]) for name in classes]
            return Listing(directory / known["file"], counts, [old[name][1] for name in classes])
        rows, counts, others = _list(folder, classes, old)
        file = directory / f"{hashlib.sha256(rows.data).hexdigest()[:24]}.rows"
        # What runs in other processes map is not changed: another content has another name.
        replace_file(file, rows.dtype["name"].str.encode().ljust(16) + rows.tobytes())
        entries = {
            name: (times[name], known["classes"][name][1] if name in old else begun, count, other)
            for name, count, other in zip(classes, counts, others, strict=True)
        }
        write_json(remembered, {"format": _FORMAT_VERSION, "file": file.name, "classes": entries})
        _remove_outdated(directory)
        return Listing(file, counts, others)


def _remove_outdated(directory: Path) -> None:
    """Remove rows that no listing names any more, and no run has begun with for so long that one may still map them."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a listing that is damaged may name any
        named = {read_json(listing)["file"] for listing in directory.glob("*.json")}
        for file in directory.glob("*.rows"):
            if file.name not in named and time.time() - file.stat().st_mtime > _KEPT_SECONDS:
                file.unlink()


def map_rows(file: Path) -> NDArray[np.void]:
    """Return the rows that a file holds, mapped into memory.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with open(file, "rb") as opened:
            name = np.dtype(opened.read(16).strip().decode())
        return np.memmap(file, _dtype(name), "r", offset=16)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"cache_dir: {file} cannot be read: {error}; all hosts have to reach it") from error


def _dtype(name: Any) -> np.dtype[np.void]:
    return np.dtype([("size", "<i8"), ("name", name)])


def _times(folder: Path, classes: Sequence[str]) -> dict[str, int]:
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(classes, pool.map(lambda name: os.stat(folder / name).st_mtime_ns, classes), strict=True))
    except OSError as error:
        raise InputError(f"path: {error.filename} cannot be read: {error.strerror}") from error


def _list(
    folder: Path, classes: Sequence[str], known: dict[str, tuple[NDArray[np.void], list[str]]]
) -> tuple[NDArray[np.void], list[int], list[list[str]]]:
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda name: known[name] if name in known else _images(folder / name), classes))
    # Arrays of bytes: a million Python strings would be copied by every forked worker that looks at them.
    name = np.dtype(f"S{max((rows.dtype['name'].itemsize for rows, _ in found), default=1)}")
    rows = np.concatenate([np.empty(0, _dtype(name)), *(rows.astype(_dtype(name)) for rows, _ in found)])
    return rows, [len(rows) for rows, _ in found], [others for _, others in found]


def _images(folder: Path) -> tuple[NDArray[np.void], list[str]]:
    """Return the names and sizes of a folder's images, and the names of what is none, both sorted."""
    found, others = [], []
    for entry in entries(folder):
        has_image_name = entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith(".")
        try:
            # Only for files with an image suffix, because reading a file's status is a request to the disk.
            status = entry.stat() if has_image_name else None
        except OSError as error:
            raise InputError(f"path: {error.filename} cannot be read: {error.strerror}") from error
        if status is not None and stat.S_ISREG(status.st_mode):
            found.append((os.fsencode(entry.name), status.st_size))
        else:
            others.append(entry.name)
    found.sort()
    rows = np.empty(len(found), _dtype(f"S{max((len(name) for name, _ in found), default=1)}"))
    rows["name"], rows["size"] = [name for name, _ in found], [size for _, size in found]
    return rows, sorted(others)


def entries(folder: Path) -> "list[os.DirEntry[str]]":
    """Return what lies in a folder. Raises InputError if it cannot be read."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError as error:
        raise InputError(f"path: {folder} cannot be read: {error.strerror}") from error
