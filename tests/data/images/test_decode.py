"""Decoded pixels are Pillow's to the bit, for every kind of file, whole or damaged."""

import io
import sys
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stacey_dist.data.images import BrokenImageError, decode
from tests.data.images.helpers import encoded, picture, pillow


def ycck() -> bytes:
    data = bytearray(encoded(picture(), mode="CMYK"))
    data[data.index(b"Adobe") + 11] = 2  # as Photoshop writes it
    assert simplejpeg.decode_jpeg_header(bytes(data))[2] == "YCCK"
    return bytes(data)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    return encoded(picture(), exif=exif)


def sixteen_bits() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(48 * 50, dtype=np.uint16).reshape(48, 50) * 27).save(file, "PNG")
    return file.getvalue()


def transparent() -> bytes:
    layers = np.dstack([picture(), picture(seed=1)[:, :, :1]])
    file = io.BytesIO()
    Image.fromarray(layers).save(file, "PNG")
    return file.getvalue()


FILES = {
    "4:2:0": lambda: encoded(picture(), subsampling="4:2:0"),
    "4:2:2": lambda: encoded(picture(), subsampling="4:2:2"),
    "4:4:4": lambda: encoded(picture(), subsampling="4:4:4", quality=97),
    "low quality": lambda: encoded(picture(), quality=5),
    "progressive": lambda: encoded(picture(), progressive=True),
    "restart markers": lambda: encoded(picture(), restart_marker_blocks=2),
    "greyscale": lambda: encoded(picture(), mode="L"),
    "RGB inside": lambda: encoded(picture(), keep_rgb=True),
    "CMYK": lambda: encoded(picture(), mode="CMYK"),
    "YCCK": ycck,
    "EXIF rotation": rotated,
    "one pixel": lambda: encoded(picture(1, 1)),
    "one pixel wide": lambda: encoded(picture(37, 1)),
    "one pixel high": lambda: encoded(picture(1, 53)),
    "odd sides": lambda: encoded(picture(61, 83)),
    "bytes after the end": lambda: encoded(picture()) + b"\0" * 100,
    "PNG": lambda: encoded(picture(), "PNG"),
    "PNG with a palette": lambda: encoded(picture(), "PNG", mode="P"),
    "PNG with a transparent palette": lambda: encoded(picture(), "PNG", mode="P", transparency=3),
    "PNG with alpha": transparent,
    "PNG of 16 bits": sixteen_bits,
    "PNG of 1 bit": lambda: encoded(picture(), "PNG", mode="1"),
    "GIF": lambda: encoded(picture(), "GIF"),
    "WebP": lambda: encoded(picture(), "WEBP"),
    "BMP": lambda: encoded(picture(), "BMP"),
    "TIFF": lambda: encoded(picture(), "TIFF"),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", FILES)
def test_as_pillow(name: str) -> None:
    data = FILES[name]()
    pixels = decode(data)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert np.array_equal(pixels, pillow(data))


def test_exif_rotation_is_not_applied() -> None:
    assert decode(rotated()).shape == (60, 80, 3)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    quality=st.integers(1, 100),
    subsampling=st.sampled_from(["4:2:0", "4:2:2", "4:4:4"]),
    progressive=st.booleans(),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
)
def test_any_jpeg_as_pillow(height: int, width: int, **options: Any) -> None:
    data = encoded(picture(height, width), **options)
    assert np.array_equal(decode(data), pillow(data))


def agrees_with_pillow(data: bytes) -> bool:
    """Whether both read it; where both do, with equal pixels."""
    try:
        expected = pillow(data)
    except Exception:
        with pytest.raises(BrokenImageError):
            decode(data)
        return False
    assert np.array_equal(decode(data), expected)
    return True


@pytest.mark.parametrize("name", ["4:2:0", "progressive", "restart markers", "PNG"])
def test_truncated_anywhere(name: str) -> None:
    data = FILES[name]()
    read = [agrees_with_pillow(data[:length]) for length in [*range(0, 700, 23), *range(700, len(data), 97)]]
    assert not any(read[:-2])
    for cut in range(1, 12):
        agrees_with_pillow(data[:-cut])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_anywhere(data: st.DataObject) -> None:
    content = bytearray(FILES[data.draw(st.sampled_from(["4:2:0", "progressive", "greyscale"]))]())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(2, len(content) - 1))] = data.draw(st.integers(0, 255))
    agrees_with_pillow(bytes(content))


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0" + bytes(50), b"<html>404</html>", bytes(99)]
)
def test_no_image(data: bytes) -> None:
    with pytest.raises(BrokenImageError, match=rf"^no image format in {len(data)} bytes$"):
        decode(data)


def test_reason_is_pillows() -> None:
    data = encoded(picture(seed=3))
    with pytest.raises(BrokenImageError, match="truncated"):
        decode(data[: len(data) // 2])


def test_ordinary_files_take_the_fast_way_and_bombs_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[decode.__module__]

    def refused(_: bytes) -> None:
        raise AssertionError("through Pillow")

    monkeypatch.setattr(module, "_decode_with_pillow", refused)
    for name in ("4:2:0", "progressive", "greyscale", "RGB inside", "EXIF rotation"):
        decode(FILES[name]())
    monkeypatch.setattr(module, "_ORDINARY_PIXELS", 60 * 80 - 1)
    with pytest.raises(AssertionError):
        decode(FILES["4:2:0"]())
