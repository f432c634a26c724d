"""From decoded images to training and evaluation images of one size."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from stacey_dist.data.sampler import uniforms
from stacey_dist.errors import InputError

Crop = Literal["random_resized", "padded", "none"]

_NARROWEST, _WIDEST = 3 / 4, 4 / 3
_TRIES = 10
_LONGEST = 100
# Where in a sample's random numbers each choice finds its own.
_FLIP, _TOP, _LEFT, _SHAPES = 0, 1, 2, 3
_NUMBERS = _SHAPES + 2 * _TRIES


@dataclass(frozen=True)
class Transform:
    """Crops, resizes and mirrors; randomness is a pure function of (seed, epoch, sample).

    Attributes:
        size: height and width of what comes out.
        crop: ``random_resized`` takes a random rectangle of ``min_scale`` to all of the area and an aspect ratio from
            3/4 to 4/3 and resizes it, as torchvision's RandomResizedCrop; ``padded`` puts ``size // 8`` black pixels
            around and takes a random square; ``none`` takes the image. For the last two, an image of another size is
            first fitted: its shorter side is resized to ``size`` and the middle taken.
        flip: mirror every other training image, at random.
        min_scale: least share of the area, for ``random_resized``.
        eval_resize: for evaluation, resize the shorter side to this and take the middle, padded with black where the
            image is smaller than ``size``; None to not resize (``random_resized``), or to fit (the others).

    Raises:
        InputError: a value is out of range.
    """

    size: int
    crop: Crop
    flip: bool
    min_scale: float = 0.08
    eval_resize: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"size: {self.size} is not allowed; it must be at least 1")
        if self.crop not in ("random_resized", "padded", "none"):
            raise InputError(f"crop: {self.crop!r} is not allowed; it must be random_resized, padded or none")
        if not 0.0 < self.min_scale <= 1.0:
            raise InputError(f"min_scale: {self.min_scale} is not allowed; it must be above 0 and at most 1")
        if self.eval_resize is not None and self.eval_resize < 1:
            raise InputError(f"eval_resize: {self.eval_resize} is not allowed; it must be at least 1 or None")

    def training(self, pixels: NDArray[np.uint8], seed: int, epoch: int, sample: int) -> NDArray[np.uint8]:
        """Return a random view of an image, uint8 of shape (size, size, 3).

        Args:
            pixels: RGB, uint8 of shape (height, width, 3).
            seed: of the run.
            epoch: how often the data were gone through before.
            sample: the image's number.
        """
        numbers = uniforms(seed, epoch, sample, _NUMBERS).tolist()
        if self.crop == "random_resized":
            top, left, height, width = random_rectangle(pixels.shape[0], pixels.shape[1], self.min_scale, numbers)
            result = resize(pixels[top : top + height, left : left + width], self.size, self.size)
        else:
            result = self._fit(pixels)
            if self.crop == "padded":
                result = self._shifted(result, numbers)
        return mirror(result) if self.flip and numbers[_FLIP] < 0.5 else result

    def evaluation(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the view of an image that evaluation uses, uint8 of shape (size, size, 3)."""
        if self.eval_resize is not None:
            pixels = resize_shorter_side(_not_too_long(pixels), self.eval_resize)
        elif self.crop != "random_resized":
            return self._fit(pixels)
        return central(pixels, self.size)

    def _fit(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return central(resize_shorter_side(_not_too_long(pixels), self.size), self.size)

    def _shifted(self, pixels: NDArray[np.uint8], numbers: list[float]) -> NDArray[np.uint8]:
        pad, size = self.size // 8, self.size
        top, left = (int(numbers[i] * (2 * pad + 1)) for i in (_TOP, _LEFT))
        padded = np.zeros((size + 2 * pad, size + 2 * pad, 3), np.uint8)
        padded[pad : pad + size, pad : pad + size] = pixels
        return padded[top : top + size, left : left + size]


def random_rectangle(height: int, width: int, min_scale: float, numbers: list[float]) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a rectangle as torchvision's RandomResizedCrop draws it.

    Up to ten shapes are tried, with area uniform and aspect ratio log-uniform; if none fits inside, the middle of the
    image with the nearest permitted aspect ratio.

    Args:
        height: of the image.
        width: of the image.
        min_scale: least share of the area.
        numbers: 23 numbers uniform in [0, 1).
    """
    for at in range(_SHAPES, _NUMBERS, 2):
        area = height * width * (min_scale + (1.0 - min_scale) * numbers[at])
        ratio = math.exp(math.log(_NARROWEST) + (math.log(_WIDEST) - math.log(_NARROWEST)) * numbers[at + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(numbers[_TOP] * (height - h + 1)), int(numbers[_LEFT] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < _NARROWEST:
        h = round(width / _NARROWEST)
    elif width / height > _WIDEST:
        w = round(height * _WIDEST)
    return (height - h) // 2, (width - w) // 2, h, w


def resize(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize by antialiased bilinear interpolation to uint8 of shape (height, width, 3)."""
    if pixels.shape[:2] == (height, width):
        return pixels
    resized = F.interpolate(_tensor(pixels), (height, width), mode="bilinear", antialias=True)
    return _array(resized)


def mirror(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Exchange left and right: an eighth of the time that copying a numpy view with negative strides takes."""
    return _array(_tensor(pixels).flip(3))


def resize_shorter_side(pixels: NDArray[np.uint8], shorter: int) -> NDArray[np.uint8]:
    """Resize to a shorter side of ``shorter`` pixels; the longer side is rounded down, as torchvision does."""
    height, width = pixels.shape[:2]
    longer = int(shorter * max(height, width) / min(height, width))
    return resize(pixels, shorter, longer) if height <= width else resize(pixels, longer, shorter)


def _not_too_long(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image, or the middle of one that is more than 100 times as long as it is wide or high.

    Resizing enlarges a line of pixels as much as its width: one of 60 000 pixels would take 12 GB.
    """
    height, width = pixels.shape[:2]
    longest = _LONGEST * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return pixels[top : top + min(height, longest), left : left + min(width, longest)]


def central(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return the middle ``size`` x ``size`` pixels, with black around where there are fewer, as torchvision does."""
    height, width = pixels.shape[:2]
    if height < size or width < size:
        rows, columns = max(0, size - height), max(0, size - width)
        around = ((rows // 2, (rows + 1) // 2), (columns // 2, (columns + 1) // 2), (0, 0))
        pixels = np.pad(pixels, around)
        height, width = pixels.shape[:2]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return pixels[top : top + size, left : left + size]


def _tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Return pixels as a tensor (1, 3, height, width) in channels_last memory format."""
    # Torch warns of arrays that cannot be written, such as those mapped from a cache.
    contiguous = np.ascontiguousarray(pixels) if pixels.flags.writeable else pixels.copy()
    # Unsqueezed by torch: numpy gives a dimension of 1 a stride by which torch would not see channels_last.
    return torch.from_numpy(contiguous).unsqueeze(0).permute(0, 3, 1, 2)


def _array(image: torch.Tensor) -> NDArray[np.uint8]:
    return image[0].permute(1, 2, 0).numpy()
