"""An encoded image as RGB pixels: libjpeg-turbo through simplejpeg for ordinary JPEG, Pillow for all else.

The pixels are those of the usual loader, ``PIL.Image.open(file).convert("RGB")``, to the bit, except where that loader
loses the image: grey images of 16 bits and of floats from 0 to 1 are scaled to 8 bits, where ``convert`` would clip
them to white or black. As in that loader (and torchvision's and timm's, which are made of it) the rotation that EXIF
asks for is not applied, transparency is dropped, and of an animation the first picture is taken.
"""

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from stacey_dist.errors import one_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The formats that are decoded, told by content. Pillow knows many more: for EPS it starts Ghostscript."""

MOST_PIXELS = 178_956_970
"""The most pixels of an image: Pillow's limit, twice the number above which it warns of a decompression bomb."""

# CMYK and YCCK are converted by Pillow in its own way.
_ORDINARY = ("YCbCr", "RGB", "Gray")
_WHITE_IS_ZERO = 0
_PHOTOMETRIC_INTERPRETATION = 262


class BrokenImageError(ValueError):
    """Bytes that are no image of a format that is read: truncated, damaged, too large, or something else."""


def decode(data: bytes) -> NDArray[np.uint8]:
    """Return an encoded image as RGB pixels of shape (height, width, 3).

    Raises:
        BrokenImageError: it is in none of FORMATS, damaged, larger than MOST_PIXELS, or its numbers have no known
            range of brightness.
    """
    if data.startswith(b"\xff\xd8\xff"):
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            if colorspace in _ORDINARY and height * width <= MOST_PIXELS:
                # Strict: it refuses what libjpeg warns of, and then Pillow decides.
                return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass
    return _decode_with_pillow(data)


def _decode_with_pillow(data: bytes) -> NDArray[np.uint8]:
    # Pillow's formats each fail in ways of their own, and all mean that the image cannot be read.
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:  # Pillow's own limit can be changed by any program
                raise BrokenImageError(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS:,}")
            return _rgb(image)
    except BrokenImageError:
        raise
    except Exception as error:
        # Pillow's message for what is no image names the buffer by its address.
        unknown = not data or "cannot identify image file" in str(error)
        reason = f"none of the formats {', '.join(FORMATS)} in {len(data)} bytes" if unknown else one_line(error)
        raise BrokenImageError(reason) from error


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours, without Pillow's warning that this would be wiser
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = Image.fromarray(_grey(image))
    return np.array(image.convert("RGB"))


def _grey(image: Image.Image) -> NDArray[np.uint8]:
    """Return an image of one large number a pixel with 8 bits a pixel.

    Raises BrokenImageError where nothing says which number is white.
    """
    values = np.asarray(image)
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    # Pillow scales the numbers of PGM to 16 bits where they have more than 8, and has them as 32-bit integers.
    if image.mode.startswith("I;") or (image.mode == "I" and image.format == "PPM"):
        # TIFF may store white as 0. Pillow inverts such images with 8 bits, but not with 16.
        negative = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO
        wide = 65535 - values.astype(np.int64) if negative else values.astype(np.int64)
        return ((wide * 255 + 32767) // 65535).astype(np.uint8)
    if image.mode == "F" and 0 <= low <= high <= 1:
        return np.floor(values * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    if 0 <= low <= high <= 255:
        return values.astype(np.uint8)
    kind = "floats" if image.mode == "F" else "32-bit integers"
    known = "0 to 1 and 0 to 255 are" if image.mode == "F" else "0 to 255 is"
    raise BrokenImageError(f"{kind} from {low:g} to {high:g}: only {known} known to go from black to white")
