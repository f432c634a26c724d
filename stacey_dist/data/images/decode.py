"""An encoded image as RGB pixels: libjpeg-turbo through simplejpeg for ordinary JPEG, Pillow for all else.

The pixels are those of the usual loader, ``PIL.Image.open(file).convert("RGB")``, to the bit. As in that loader (and
torchvision's and timm's, which are made of it) the rotation that EXIF asks for is not applied.
"""

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from stacey_dist.data.images.image_set import ImageSet

# CMYK and YCCK are converted by Pillow in its own way.
_ORDINARY = ("YCbCr", "RGB", "Gray")
# Where Pillow begins to warn of an image made to fill the memory, it decides.
_ORDINARY_PIXELS = Image.MAX_IMAGE_PIXELS or 0


class BrokenImageError(ValueError):
    """Bytes that Pillow does not decode either: truncated, damaged, or no image. The message says what it says."""


def decode(data: bytes) -> NDArray[np.uint8]:
    """Return an encoded image as RGB pixels of shape (height, width, 3).

    Raises:
        BrokenImageError: neither decoder reads it.
    """
    if data.startswith(b"\xff\xd8\xff"):
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            if colorspace in _ORDINARY and height * width <= _ORDINARY_PIXELS:
                # Strict: it refuses what libjpeg warns of, and then Pillow decides.
                return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass
    return _decode_with_pillow(data)


def read_pixels(images: ImageSet, i: int) -> NDArray[np.uint8]:
    """Return image i of a set as RGB pixels of shape (height, width, 3).

    Raises:
        BrokenImageError: it cannot be decoded.
        OSError: its file cannot be read.
    """
    content = images.read(i)
    return decode(content) if isinstance(content, bytes) else content


def _decode_with_pillow(data: bytes) -> NDArray[np.uint8]:
    # Pillow's many formats each fail in ways of their own, and all mean that the image cannot be read.
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:
        # Pillow's message for what is no image names the buffer by its address.
        unknown = not data or "cannot identify image file" in str(error)
        reason = f"no image format in {len(data)} bytes" if unknown else f"{type(error).__name__}: {error}"
        raise BrokenImageError(reason) from error
