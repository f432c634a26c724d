"""Images made on the spot: photo-like, in every format, in every layout."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stacey_dist.data.images import ArrayImages, BrokenImageError, ImageSet, read_pixels


def picture(height: int = 60, width: int = 80, seed: int = 0) -> NDArray[np.uint8]:
    """Return smooth colours, edges and some noise, uint8 of shape (height, width, 3)."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (max(2, height // 12), max(2, width // 12), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    smooth[height // 3 :, : width // 2] //= 2
    return np.clip(smooth + generator.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)


def encoded(pixels: NDArray[Any], format: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format, **options)
    return file.getvalue()


def pillow(data: bytes) -> NDArray[np.uint8]:
    """Return what the usual loader gives."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def numbered(count: int, side: int = 8) -> ArrayImages:
    """Return images; number i, of class i % 3, has i % 256, i // 256 and 0 in every pixel's channels."""
    i = np.arange(count)
    colours = np.stack([i % 256, i // 256, np.zeros_like(i)], axis=1).astype(np.uint8)
    return ArrayImages(np.tile(colours[:, None, None], (1, side, side, 1)), i % 3, ["a", "b", "c"])


class EncodedImages(ArrayImages):
    """As PNG files, some of which are broken."""

    def __init__(self, images: ArrayImages, broken: set[int] | frozenset[int] = frozenset()) -> None:
        super().__init__(images.pixels, images.labels, images.classes)
        self.broken = broken

    def read(self, i: int) -> Any:
        return b"no image" if i in self.broken else encoded(self.pixels[i], "PNG")


class KnownBroken(ArrayImages):
    """Whose set knows that they cannot be read."""

    def read(self, i: int) -> Any:
        raise BrokenImageError("known")


def image_tree(root: Path, splits: tuple[str, ...] = ("train", "val"), per_class: int = 2) -> Path:
    """Write a layout as ImageNet's: classes n01 and n02."""
    for number, split in enumerate(splits):
        for place, name in enumerate(("n01", "n02")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                data = encoded(picture(seed=100 * number + 10 * place + i))
                (folder / f"{name}_{i}.JPEG").write_bytes(data)
    return root


def same(images: ImageSet) -> ImageSet:
    """Return a set as a worker that is not forked gets it, which must be the same."""
    copy: ImageSet = pickle.loads(pickle.dumps(images))
    assert copy.classes == images.classes
    assert np.array_equal(copy.labels, images.labels)
    assert copy.identity == images.identity
    for i in range(len(images)):
        assert np.array_equal(read_pixels(copy, i), read_pixels(images, i))
        assert copy.name(i) == images.name(i)
    return copy


MODULES_ALONE = """
import sys, types
for name in ("stacey_dist", "stacey_dist.data", "stacey_dist.data.images"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [name.replace(".", "/")]
"""
"""The beginning of a program that imports modules here without their packages, which load torch in seconds."""
