"""Decoded images on a disk, memory-mapped: each image is decoded once and not once an epoch."""

import hashlib
import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from stacey_dist.cores import available_cores
from stacey_dist.data.images.augment import resize_shorter_side
from stacey_dist.data.images.decode import BrokenImageError, read_pixels
from stacey_dist.data.images.image_set import ImageSet, sampled
from stacey_dist.data.lock import locked_directory
from stacey_dist.errors import SettingsError
from stacey_dist.files import replace_file, write_json

Cache = Literal["none", "decoded", "resized"]

FORMAT_VERSION = 1
COMPLETE = "complete.json"

PART_IMAGES = 4096
"""Images in a part: 1 to 3 GB of photos. A killed preparation repeats at most one part."""

# What the index has of an image: where it begins in its part, and its height and width, 0 where it is broken.
_ENTRY = np.dtype([("offset", "<i8"), ("height", "<i4"), ("width", "<i4")])


class CachedImages:
    """The pixels of a complete cache, with the labels, classes and names of the images they were made from.

    Args:
        directory: of the cache.
        images: what it was made from.
        identity: of its pixels.

    Raises:
        SettingsError: the cache is damaged.
    """

    def __init__(self, directory: Path, images: ImageSet, identity: str) -> None:
        self.directory, self.images, self.identity = directory, images, identity
        self._open()

    def _open(self) -> None:
        try:
            complete = json.loads((self.directory / COMPLETE).read_text(encoding="utf-8"))
            self._part_images: int = complete["part_images"]
            parts = range(-(-len(self.images) // self._part_images))
            indexes = [(self.directory / _index_name(part)).read_bytes() for part in parts]
            if zlib.crc32(b"".join(indexes)) != complete["index_crc32"]:
                raise ValueError("its index was altered")
            self._index = np.frombuffer(b"".join(indexes), dtype=_ENTRY)
            self._pixels = [
                _map(self.directory / _part_name(part), size) for part, size in enumerate(complete["part_bytes"])
            ]
        except (OSError, ValueError, KeyError) as error:
            raise SettingsError(f"data.cache: {self.directory} is damaged ({error}); delete it") from error

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return self.images.classes

    @property
    def labels(self) -> NDArray[np.int64]:
        """Every image's label."""
        return self.images.labels

    def __len__(self) -> int:
        return len(self._index)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Return the pixels of image i, mapped from the disk. Raises BrokenImageError where it was broken."""
        offset, height, width = self._index[i].tolist()
        if not height:
            raise BrokenImageError("it was broken when the cache was made")
        return self._pixels[i // self._part_images][offset : offset + height * width * 3].reshape(height, width, 3)

    def name(self, i: int) -> str:
        """Return how a person finds the image that i was made from."""
        return self.images.name(i)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling memory maps would copy their content.
        return CachedImages, (self.directory, self.images, self.identity)


def cached(
    images: ImageSet,
    cache: Cache,
    directory: Path,
    resize_to: int | None = None,
    *,
    threads: int | None = None,
    progress: bool = True,
) -> ImageSet:
    """Return the same images decoded on a disk, making the cache first if it is not there yet.

    The cache is a directory named by the images' identity in ``directory``: parts of raw pixels, each with an index,
    and ``complete.json``, written last. A killed preparation goes on after its last whole part. Any number of
    processes of a machine may ask for it at once: one makes it, the others wait.

    Args:
        images: to decode. A broken one stays broken.
        cache: ``none`` returns ``images``; ``decoded`` keeps the pixels that they have, to the bit; ``resized`` first
            resizes images whose shorter side is above ``resize_to`` to that, antialiased.
        directory: where caches are kept.
        resize_to: for ``resized``.
        threads: that decode; None for as many as there are cores.
        progress: show a progress bar on stderr.

    Raises:
        SettingsError: the directory cannot be made, the disk is too small, the cache is damaged.
    """
    if cache == "none":
        return images
    if cache not in ("decoded", "resized"):
        raise SettingsError(f"data.cache must be none, decoded or resized, got {cache!r}")
    if cache == "resized" and (resize_to is None or resize_to < 1):
        raise SettingsError(f"data.cache_resize must be at least 1 for data.cache resized, got {resize_to}")
    shorter = resize_to if cache == "resized" else None
    # Decoded pixels are the images themselves; resized ones are other images.
    identity = images.identity if shorter is None else _hash([images.identity, "resized", shorter])
    place = Path(directory) / f"images-{_hash([FORMAT_VERSION, images.identity, shorter])[:24]}"
    if not (place / COMPLETE).exists():
        with locked_directory(place, "data.cache", "set data.cache: none", announce=progress):
            if not (place / COMPLETE).exists():
                _make(place, images, shorter, threads or available_cores(), progress)
    return CachedImages(place, images, identity)


def _make(directory: Path, images: ImageSet, shorter: int | None, threads: int, progress: bool) -> None:
    def load(i: int) -> NDArray[np.uint8] | None:
        return _load(images, i, shorter)

    count = len(images)
    # Of parts, the ones with an index are whole: it is renamed last.
    starts = [s for s in range(0, count, PART_IMAGES) if not (directory / _index_name(s // PART_IMAGES)).exists()]
    left = sum(min(PART_IMAGES, count - start) for start in starts)
    with (
        ThreadPoolExecutor(threads, "decode") as pool,
        tqdm(
            desc="decoding images",
            total=count,
            initial=count - left,
            unit="img",
            disable=not progress,
            dynamic_ncols=True,
        ) as bar,
    ):
        _check_space(directory, [_load(images, i, shorter) for i in sampled(count)], left)
        for start in starts:
            numbers = range(start, min(start + PART_IMAGES, count))
            _write_part(directory, start // PART_IMAGES, _in_order(pool, load, numbers, 4 * threads), bar)
    parts = range(-(-count // PART_IMAGES))
    index = b"".join((directory / _index_name(part)).read_bytes() for part in parts)
    sizes = [(directory / _part_name(part)).stat().st_size for part in parts]
    write_json(
        directory / COMPLETE,
        {
            "format": FORMAT_VERSION,
            "images": count,
            "part_images": PART_IMAGES,
            "part_bytes": sizes,
            "index_crc32": zlib.crc32(index),
        },
    )


def _load(images: ImageSet, i: int, shorter: int | None) -> NDArray[np.uint8] | None:
    """Return what the cache has of image i; None where it is broken."""
    try:
        pixels = read_pixels(images, i)
    except BrokenImageError:
        return None
    return resize_shorter_side(pixels, shorter) if shorter and min(pixels.shape[:2]) > shorter else pixels


def _in_order(
    pool: ThreadPoolExecutor, load: Callable[[int], NDArray[np.uint8] | None], numbers: range, ahead: int
) -> Iterator[NDArray[np.uint8] | None]:
    """Yield load(i) in order, with at most ``ahead`` of them loading or waiting."""
    coming: deque[Any] = deque()
    for i in numbers:
        coming.append(pool.submit(load, i))
        if len(coming) >= ahead:
            yield coming.popleft().result()
    while coming:
        yield coming.popleft().result()


def _write_part(directory: Path, part: int, pictures: Iterator[NDArray[np.uint8] | None], bar: "tqdm[Any]") -> None:
    """Write a part and then its index, each under another name until it is whole."""
    entries, offset = [], 0
    temporary = directory / "part.tmp"
    with open(temporary, "wb") as file:
        for pixels in pictures:
            height, width = (0, 0) if pixels is None else pixels.shape[:2]
            entries.append((offset, height, width))
            if pixels is not None:
                file.write(np.ascontiguousarray(pixels).data)
                offset += pixels.size
            bar.update()
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / _part_name(part))
    replace_file(directory / _index_name(part), np.array(entries, dtype=_ENTRY).tobytes())


def _check_space(directory: Path, pictures: list[NDArray[np.uint8] | None], count: int) -> None:
    """Raise SettingsError where ``count`` images as large as these, on average, will not fit on the disk."""
    needed = int(sum(pixels.size for pixels in pictures if pixels is not None) / len(pictures) * count * 1.02)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise SettingsError(
            f"data.cache: {directory} needs about {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free; "
            "set another data.cache_dir, or data.cache: none"
        )


def _map(path: Path, size: int) -> NDArray[np.uint8]:
    found = path.stat().st_size
    if found != size:
        raise ValueError(f"{path.name} has {found} bytes of {size}")
    # Nothing can be mapped of a part whose images are all broken.
    return np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, dtype=np.uint8)


def _part_name(part: int) -> str:
    return f"part-{part:05d}.bin"


def _index_name(part: int) -> str:
    return f"part-{part:05d}.index"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
