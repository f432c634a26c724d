"""Decoded pixels are Pillow's to the bit, for every kind of file, whole or damaged."""

import contextlib
import io
import re
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from stacey_dist.data.images import BrokenImageError, decode
from stacey_dist.data.images.decode import FORMATS
from tests.data.images.helpers import MODULES_ALONE, encoded, picture, pillow

ROOT = Path(__file__).parents[3]


def ycck() -> bytes:
    data = bytearray(encoded(picture(), mode="CMYK"))
    data[data.index(b"Adobe") + 11] = 2  # as Photoshop writes it
    assert simplejpeg.decode_jpeg_header(bytes(data))[2] == "YCCK"
    return bytes(data)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    return encoded(picture(), exif=exif)


def transparent() -> bytes:
    layers = np.dstack([picture(), picture(seed=1)[:, :, :1]])
    file = io.BytesIO()
    Image.fromarray(layers).save(file, "PNG")
    return file.getvalue()


def animated(format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    first, second = (Image.fromarray(picture(seed=seed)) for seed in (1, 2))
    first.save(file, format, save_all=True, append_images=[second] * 3, **options)
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
    "PNG with grey and alpha": lambda: encoded(picture(), "PNG", mode="LA"),
    "PNG of 1 bit": lambda: encoded(picture(), "PNG", mode="1"),
    "GIF": lambda: encoded(picture(), "GIF"),
    "WebP": lambda: encoded(picture(), "WEBP"),
    "BMP": lambda: encoded(picture(), "BMP"),
    "TIFF": lambda: encoded(picture(), "TIFF"),
    "TIFF, CMYK": lambda: encoded(picture(), "TIFF", mode="CMYK"),
    "PPM": lambda: encoded(picture(), "PPM"),
    "animated GIF": lambda: animated("GIF"),
    "animated WebP": lambda: animated("WEBP", lossless=True),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # Pillow's, in the loader compared with
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
    """Return whether both read it, if with equal pixels."""
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
    with pytest.raises(BrokenImageError, match=rf"^none of the formats JPEG, .* in {len(data)} bytes$"):
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
    monkeypatch.setattr(module, "MOST_PIXELS", 60 * 80 - 1)
    with pytest.raises(AssertionError):
        decode(FILES["4:2:0"]())


def test_of_an_animation_the_first_picture_is_taken() -> None:
    assert np.array_equal(decode(animated("WEBP", lossless=True)), picture(seed=1))


def test_a_palette_with_transparency_is_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert len(decode(encoded(picture(), "PNG", mode="P", transparency=bytes(range(256))))) == 60
    assert not recwarn.list


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) show\nshowpage\n%%EOF\n"


def others() -> dict[str, bytes]:
    """Return an image in every other format that Pillow writes, and PostScript in the forms that it knows."""
    Image.init()
    found = {
        "EPS": POSTSCRIPT,
        "EPS of DOS": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, 200) + bytes(20) + POSTSCRIPT,
    }
    for format in sorted(set(Image.SAVE) - {*FORMATS, "MPO", "DIB"}):  # those two are read as JPEG and BMP
        file = io.BytesIO()
        # Some only write other modes, or with options; some will be dropped.
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
            Image.fromarray(picture(16, 16)).save(file, format)
            found.setdefault(format, file.getvalue())
    return found


@pytest.mark.parametrize(("format", "data"), others().items())
def test_other_formats_are_refused_and_start_nothing(
    format: str, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "started"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(BrokenImageError, match=r"^none of the formats"):
        decode(data)
    assert not mark.exists()


def test_pillow_is_told_the_formats_wherever_it_is_called() -> None:
    files = [file for folder in ("stacey_dist", "experiments", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    calls = [line for file in files for line in file.read_text().splitlines() if re.search(r"Image\.open\([^f]", line)]
    assert len(calls) >= 3
    assert all("formats=" in line or "``" in line for line in calls), calls


def saved(pixels: NDArray[Any], format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


RAMP = np.arange(48 * 50, dtype=np.uint16).reshape(48, 50) * 27


# Pillow 10 reads PPM of 16 bits, and does not write it.
PORTABLE_GREY_MAP = b"P5 50 48 65535\n" + RAMP.astype(">u2").tobytes()


@pytest.mark.parametrize(
    "data", [saved(RAMP, "PNG"), saved(RAMP, "TIFF"), PORTABLE_GREY_MAP], ids=["PNG", "TIFF", "PPM"]
)
def test_sixteen_bits_are_scaled(data: bytes) -> None:
    expected = np.round(RAMP / 65535 * 255)
    pixels = decode(data)
    assert all(np.array_equal(pixels[..., channel], expected) for channel in range(3))


def test_sixteen_bits_in_the_other_order_and_as_a_negative() -> None:
    data = bytearray(saved(RAMP, "TIFF", tiffinfo={262: 0}))
    assert Image.open(io.BytesIO(data)).tag_v2[262] == 0  # type: ignore[attr-defined]
    assert np.array_equal(decode(bytes(data))[..., 0], 255 - decode(saved(RAMP, "TIFF"))[..., 0])
    # Byte order "MM", one strip: a header, the tags, the numbers.
    tags = [(256, 3, 2), (257, 3, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 1), (279, 4, 4)]
    directory = b"".join(
        struct.pack(">HHI", tag, kind, 1)
        + struct.pack(">HH" if kind == 3 else ">I", *([value, 0] if kind == 3 else [value]))
        for tag, kind, value in tags
    )
    content = b"MM\x00\x2a" + struct.pack(">IH", 8, len(tags)) + directory + bytes(4)
    content = content.ljust(200, b"\0") + struct.pack(">HH", 65535, 257)
    assert decode(content)[0, :, 0].tolist() == [255, 1]


def test_floats_from_0_to_1_are_scaled_and_to_255_are_not() -> None:
    ramp = (RAMP / 65535).astype(np.float32)
    for format in ("TIFF", "PPM"):
        assert np.array_equal(decode(saved(ramp, format))[..., 1], np.floor(ramp * np.float32(255) + np.float32(0.5)))
    wide = (ramp * 255).astype(np.float32)
    assert np.array_equal(decode(saved(wide, "TIFF")), pillow(saved(wide, "TIFF")))
    integers = RAMP.astype(np.int32) // 257
    assert np.array_equal(decode(saved(integers, "TIFF")), pillow(saved(integers, "TIFF")))


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (RAMP.astype(np.int32), r"32-bit integers from 0 to 64773: only 0 to 255 is known to go from black to white"),
        (RAMP.astype(np.int32) - 300, r"32-bit integers from -300 to"),
        (RAMP.astype(np.float32), r"floats from 0 to 64773: only 0 to 1 and 0 to 255 are known to go"),
        (np.full((4, 4), np.nan, np.float32), r"floats from nan to nan"),
        (np.full((4, 4), np.inf, np.float32), r"floats from inf to inf"),
    ],
)  # fmt: skip
def test_numbers_without_a_known_white_are_refused(pixels: NDArray[Any], reason: str) -> None:
    with pytest.raises(BrokenImageError, match=reason):
        decode(saved(pixels, "TIFF"))


def claiming(width: int, height: int) -> dict[str, bytes]:
    """Small files that say they are large."""
    jpeg = bytearray(encoded(picture()))
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = struct.pack(">HH", min(height, 65500), min(width, 65500))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return {"JPEG": bytes(jpeg), "PNG": png, "PPM": b"P6 %d %d 255\n" % (width, height)}


def test_files_made_to_fill_the_memory_are_refused(tmp_path: Path) -> None:
    # A process with too little memory for such an image, even for a moment.
    code = MODULES_ALONE + (
        "import resource\n"
        "from pathlib import Path\n"
        "from stacey_dist.data.images.decode import BrokenImageError, decode\n"
        "import psutil; size = psutil.Process().memory_info().vms + 2**28\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "for name in sys.argv[1:]:\n"
        "    try: decode(Path(name).read_bytes())\n"
        "    except BrokenImageError as error: print(error)"
    )
    for name, data in claiming(60_000, 60_000).items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", code, *sorted(tmp_path.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.count("DecompressionBombError: Image size (3600000000 pixels) exceeds limit") == 3


def test_the_limit_does_not_depend_on_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BrokenImageError, match="60000 x 60000 pixels are more than 178,956,970"):
        decode(claiming(60_000, 60_000)["PPM"])
