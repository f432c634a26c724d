"""The drawn digits, and what a path is: its characters, none of which is a pattern."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stacey_dist.data.images import ImageSet, cached, open_images, read_pixels
from stacey_dist.errors import InputError
from tests.data.images.helpers import encoded, image_tree, picture
from tests.data.images.test_cifar import write_cifar10
from tests.data.images.test_tables import rows, write

ROOT = Path(__file__).parents[3]


def test_drawn_digits() -> None:
    train, validation = open_images()
    assert np.bincount(train.labels).tolist() == [500] * 10
    assert np.bincount(validation.labels).tolist() == [100] * 10
    assert train.classes == validation.classes == list("0123456789")
    pixels = train.read(0)
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (28, 28, 3)
    assert np.array_equal(pixels[..., 0], pixels[..., 2])
    assert train.name(3) == "drawn digits, training image 3"
    assert train.identity != validation.identity
    seen = {image.tobytes() for images in (train, validation) for image in images.pixels}  # type: ignore[attr-defined]
    assert len(seen) == 6000


def test_importing_is_light_and_digits_import_nothing() -> None:
    code = (
        "import sys, stacey_dist.data.images as images\n"
        "heavy = {'transformers', 'datasets', 'sklearn', 'pandas', 'torchvision'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "images.open_images()\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n[]\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(path="{}/nowhere"),
            r"^path: .*/nowhere is no directory; looked for train/ and val/.*parquet.*CIFAR",
        ),
        (dict(path="{}"), r"^path: .* holds no images in a layout that can be read; looked for train/ and val/"),
        (dict(path="{}", dataset="x"), r"^path: '.*' and `dataset` 'x': only one of them can be set"),
        (dict(label_column="y"), r"label_column: 'y': only parquet files and datasets of the Hub have columns"),
        (dict(path="{}", image_column="x"), r"image_column: 'x': only parquet"),
    ],
)
def test_bad_paths(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_images(**{key: value.format(tmp_path) for key, value in settings.items()})
    assert "\n" not in str(caught.value)


# A name, and others that it would match as a pattern, or in a shell, or as a chain of file systems.
NAMES = [
    ("a[1]", ["a1"]),
    ("b*", ["b", "bc"]),
    ("c?", ["cd"]),
    ("{d,e}", ["d", "e"]),
    ("[!f]", ["g"]),
    ("h**", ["h", "h/i"]),
    ("zip::j", ["j", "zip"]),
    ("file:", ["file"]),
    ("~", []),
    ("~nobody", ["nobody"]),
    ("$HOME", []),
    (" k  l ", ["k  l", "k l"]),
    ("m%20n", ["m n"]),
    ("o#p", ["o"]),
    ("q\\\\[r]", ["q[r]"]),
]


def folders(place: Path, seed: int) -> None:
    for split in ("train", "val"):
        (place / split / "one").mkdir(parents=True)
        (place / split / "one/x.png").write_bytes(encoded(picture(seed=seed), "PNG"))


def parquet(place: Path, seed: int) -> None:
    for split in ("train", "val"):
        content = {"bytes": encoded(picture(seed=seed), "PNG"), "path": None}
        write(place / f"{split}-0.parquet", rows(1) | {"img": [content]})


def cifar(place: Path, seed: int) -> None:
    write_cifar10(place, seed=seed)


def pixels_of(images: tuple[ImageSet, ImageSet]) -> list[bytes]:
    return [read_pixels(part, i).tobytes() for part in images for i in range(len(part))]


@pytest.mark.parametrize(("name", "decoys"), NAMES)
@pytest.mark.parametrize("layout", [folders, parquet, cifar])
def test_paths_are_literal(
    layout: Any, name: str, decoys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data in a folder of a special name, and other data of the same layout in those it would match."""
    layout(tmp_path / "plain", 1)
    expected = pixels_of(open_images(str(tmp_path / "plain"), cache_dir=str(tmp_path / "cache")))
    for decoy in decoys:
        layout(tmp_path / "in" / decoy, 2)
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir(exist_ok=True)
    monkeypatch.chdir("in")
    for path in (name, f"{tmp_path}/in/{name}"):
        with pytest.raises(InputError, match=r"^path: .* is no directory"):
            open_images(path, cache_dir="../cache")
    shutil.copytree(tmp_path / "plain", name)  # `datasets`, which writes the parquet files, could not write there
    for path in (name, f"{tmp_path}/in/{name}"):
        # Nor is a cache of such a name put elsewhere.
        before = {file for file in tmp_path.rglob("*") if name not in file.parts[len(tmp_path.parts) :]}
        found = open_images(path, cache_dir=f"caches/{name}")
        assert pixels_of(found) == expected
        for images in found:
            decoded = cached(images, "decoded", Path("caches", name), progress=False)
            assert read_pixels(decoded, 0).tobytes() == read_pixels(images, 0).tobytes()
        now = {file for file in tmp_path.rglob("*") if name not in file.parts[len(tmp_path.parts) :]}
        assert now - before <= {tmp_path / "in/caches"}


@pytest.mark.parametrize("name", [name for name, _ in NAMES if "::" not in name])
def test_a_hub_cache_of_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parquet(tmp_path / "set", 1)
    found = open_images(dataset=str(tmp_path / "set"), cache_dir=name)
    assert pixels_of(found) == [picture(seed=1).tobytes()] * 2
    assert (tmp_path / name).is_dir()
    assert {entry.name for entry in tmp_path.iterdir()} == {"set", name}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(dataset="{}/s*t"), r"dataset: '.*/s\*t' is no name of a data set; `path` names a directory"),
        (dict(dataset="{}/[s]et"), r"dataset: '.*' is no name of a data set"),
        (dict(dataset="zip::{}/set"), r"dataset: '.*' is no name of a data set"),
        (dict(dataset="{}/set", cache_dir="{}/a::b"), r"cache_dir: .*a::b must not hold '::' for `dataset`"),
    ],
)
def test_names_of_data_sets_are_no_patterns(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    parquet(tmp_path / "set", 1)
    with pytest.raises(InputError, match=message):
        open_images(**{key: value.format(tmp_path) for key, value in settings.items()})


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_tree(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_images("~/data")[0]) == 4
