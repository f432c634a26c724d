"""Decoded images on a disk, memory-mapped: each image is decoded once and not once an epoch."""

import functools
import hashlib
import json
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from stacey_dist.cores import available_cores
from stacey_dist.data.images.augment import resize_shorter_side
from stacey_dist.data.images.decode import BrokenImageError
from stacey_dist.data.images.image_set import ImageSet, read_pixels, sampled
from stacey_dist.data.lock import locked_directory
from stacey_dist.errors import InputError
from stacey_dist.files import read_json, replace_file, replacing, write_json

Cache = Literal["none", "decoded", "resized"]

FORMAT_VERSION = 1
COMPLETE = "complete.json"

PART_IMAGES = 4096
"""Images in a part: 1 to 3 GB of photos. A killed preparation repeats at most one part."""

OPEN_PARTS = 256
"""A process keeps so many parts of a cache mapped. A map holds a file descriptor, of which systems allow 1 024."""

# What the index has of an image: where it begins in its part, and its height and width, 0 where it is broken.
_ENTRY = np.dtype([("offset", "<i8"), ("height", "<i4"), ("width", "<i4")])

Load = Callable[[int], NDArray[np.uint8] | None]
"""Returns the pixels of an image; None where it is broken."""


class CachedImages:
    """The pixels of a complete cache, with the labels, classes and names of the images they were made from.

    It can be pickled. Neither it nor a copy looks at a file before it reads from it.

    Args:
        directory: of the cache.
        images: what it was made from.
        identity: of its pixels.
        part_images: how many of them a part has.
    """

    def __init__(self, directory: Path, images: ImageSet, identity: str, part_images: int) -> None:
        self.directory, self.images, self.identity, self._part_images = directory, images, identity, part_images
        self.classes, self.labels = images.classes, images.labels
        self._part = functools.lru_cache(OPEN_PARTS)(functools.partial(_map, directory))

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling memory maps would copy their content.
        return CachedImages, (self.directory, self.images, self.identity, self._part_images)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Return the pixels of image i, mapped from the disk. Raises BrokenImageError where it was broken."""
        part, place = divmod(i, self._part_images)
        index, pixels = self._part(part)
        offset, height, width = index[place].tolist()
        if not height:
            raise BrokenImageError("it was broken when the cache was made")
        return pixels[offset : offset + height * width * 3].reshape(height, width, 3)

    def name(self, i: int) -> str:
        """Return how a person finds the image that i was made from."""
        return self.images.name(i)


def cached(
    images: ImageSet,
    cache: Cache,
    directory: Path,
    resize_to: int | None = None,
    *,
    progress: bool = True,
) -> ImageSet:
    """Return the same images decoded on a disk, making the cache first if it is not there yet.

    The cache is a directory named by the images' identity in ``directory``: parts of raw pixels, each with an index,
    and ``complete.json``, written last. A killed preparation resumes after its last whole part. Any number of
    processes of a machine may ask for it at once: one makes it, the others wait.

    Args:
        images: to decode. A broken one stays broken.
        cache: ``none`` returns ``images``; ``decoded`` keeps the pixels that they have, to the bit; ``resized`` first
            resizes images whose shorter side is above ``resize_to`` to that, antialiased.
        directory: where caches are kept.
        resize_to: for ``resized``.
        progress: show a progress bar on stderr.

    Raises:
        InputError: the directory cannot be made, the disk is too small, the cache is damaged.
    """
    if cache == "none":
        return images
    if cache not in ("decoded", "resized"):
        raise InputError(f"cache: {cache!r} is not allowed; it must be none, decoded or resized")
    if cache == "resized" and (resize_to is None or resize_to < 1):
        raise InputError(f"resize_to: {resize_to} is not allowed with `cache` resized; it must be at least 1")
    shorter = resize_to if cache == "resized" else None
    # Decoded pixels are the images themselves; resized ones are other images.
    identity = images.identity if shorter is None else _hash([images.identity, "resized", shorter])
    # The identity of a table looks at some of its images. That of a folder has the sizes of all.
    sizes = getattr(images, "sizes", None)
    known = [] if sizes is None else [hashlib.sha256(sizes.data).hexdigest()]
    place = Path(directory) / f"images-{_hash([FORMAT_VERSION, images.identity, shorter, *known])[:24]}"

    def load(i: int) -> NDArray[np.uint8] | None:
        try:
            pixels = read_pixels(images, i)
        except BrokenImageError:
            return None
        return resize_shorter_side(pixels, shorter) if shorter and min(pixels.shape[:2]) > shorter else pixels

    if not (place / COMPLETE).exists():
        with locked_directory(place, "cache", "set `cache` to none"):
            if not (place / COMPLETE).exists():
                _make(place, load, len(images), progress)
    return CachedImages(place, images, identity, _checked_part_images(place, len(images)))


def _checked_part_images(directory: Path, count: int) -> int:
    """Return the number of images in a part of a complete cache. Raises InputError if the cache is damaged."""
    try:
        complete = read_json(directory / COMPLETE)
        part_images = int(complete["part_images"])
        if zlib.crc32(_read_index(directory, range(-(-count // part_images)))) != complete["index_crc32"]:
            raise ValueError("its index was altered")
        for number, size in enumerate(complete["part_bytes"]):
            file = _file(directory, number, "bin")
            if (found := file.stat().st_size) != size:
                raise ValueError(f"{file.name} has {found} bytes of {size}")
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise InputError(f"cache: {directory} is damaged ({error}); delete it") from error
    return part_images


def _make(directory: Path, load: Load, count: int, progress: bool) -> None:
    threads = available_cores()
    parts = [range(start, min(start + PART_IMAGES, count)) for start in range(0, count, PART_IMAGES)]
    # Of parts, the ones with an index are whole: it is renamed last.
    left = [number for number in range(len(parts)) if not _file(directory, number, "index").exists()]
    images_left = sum(len(parts[number]) for number in left)
    bar = tqdm(
        desc="decoding images",
        total=count,
        initial=count - images_left,
        unit="img",
        disable=not progress,
        dynamic_ncols=True,
    )
    with bar, ThreadPoolExecutor(threads, "decode") as pool:
        sizes = [0 if (pixels := load(i)) is None else pixels.size for i in sampled(count)]
        _check_space(directory, sizes, images_left)
        for number in left:
            _write_part(directory, number, _in_order(pool, load, parts[number], 4 * threads), bar)
    complete = {
        "format": FORMAT_VERSION,
        "images": count,
        "part_images": PART_IMAGES,
        "part_bytes": [_file(directory, number, "bin").stat().st_size for number in range(len(parts))],
        "index_crc32": zlib.crc32(_read_index(directory, range(len(parts)))),
    }
    write_json(directory / COMPLETE, complete)


def _in_order(pool: ThreadPoolExecutor, load: Load, numbers: range, ahead: int) -> Iterator[NDArray[np.uint8] | None]:
    """Yield load(i) in order, with at most ``ahead`` of them loading or waiting."""
    coming: deque[Future[NDArray[np.uint8] | None]] = deque()
    for i in numbers:
        coming.append(pool.submit(load, i))
        if len(coming) >= ahead:
            yield coming.popleft().result()
    while coming:
        yield coming.popleft().result()


def _write_part(directory: Path, number: int, pictures: Iterator[NDArray[np.uint8] | None], bar: "tqdm[Any]") -> None:
    """Write a part and then its index."""
    entries, offset = [], 0
    with replacing(_file(directory, number, "bin")) as file:
        for pixels in pictures:
            height, width = (0, 0) if pixels is None else pixels.shape[:2]
            entries.append((offset, height, width))
            if pixels is not None:
                file.write(np.ascontiguousarray(pixels).data)
                offset += pixels.size
            bar.update()
    replace_file(_file(directory, number, "index"), np.array(entries, dtype=_ENTRY).tobytes())


def _check_space(directory: Path, sizes: list[int], count: int) -> None:
    """Raise InputError where ``count`` images of these sizes in bytes, on average, will not fit on the disk."""
    needed = int(sum(sizes) / len(sizes) * count * 1.02)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise InputError(
            f"cache: {directory} needs about {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free; "
            "set another `cache_dir`, or none"
        )


def _read_index(directory: Path, parts: range) -> bytes:
    return b"".join(_file(directory, number, "index").read_bytes() for number in parts)


def _map(directory: Path, number: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Return the index of a part, and its pixels, mapped."""
    index = np.frombuffer(_file(directory, number, "index").read_bytes(), dtype=_ENTRY)
    path = _file(directory, number, "bin")
    # Nothing can be mapped of a part whose images are all broken.
    pixels = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, dtype=np.uint8)
    return index, pixels


def _file(directory: Path, part: int, kind: Literal["bin", "index"]) -> Path:
    return directory / f"part-{part:05d}.{kind}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
